// Draws the rollouts of a report from the JSON that the page carries, a few at a time, and searches
// them. Texts come from models: they are set as text, never as markup.
'use strict';
(() => {
  const source = document.getElementById('data');
  if (!source) return;
  const {colours, cards} = JSON.parse(source.textContent);
  const AT_ONCE = 10;  // cards
  const TOKENS_AT_ONCE = 6000;
  const find = id => document.getElementById(id);
  const place = find('cards'), further = find('further'), count = find('count');
  let chosen = cards, drawn = 0;

  function add(parent, tag, name, text) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }

  // as cards._paint does
  function paint(gap) {
    const strength = Math.min(Math.abs(gap) / colours.full, 1);
    const alpha = (colours.strongest * strength).toFixed(2);
    const style = `background:rgba(${gap > 0 ? colours.more : colours.less},${alpha})`;
    return style + (strength > 0.8 ? ';color:#fff' : '');
  }

  function signed(gap) {
    return (gap < 0 ? '-' : '+') + Math.abs(gap).toFixed(2) + ' nats';
  }

  function addToken(parent, token, gap) {
    const span = add(parent, 'span', 'token');
    if (gap !== null) {
      span.setAttribute('style', paint(gap));
      span.title = signed(gap);
      span.tabIndex = -1;  // a tap gives it the focus, and the style shows its number
    }
    if (!token) add(span, 'i', '', '\u2205');
    token.split('\n').forEach((line, number) => {
      if (number) {
        add(span, 'i', '', '\u21b5');
        span.append('\n');
      }
      span.append(line);
    });
  }

  function addResponse(parent, tokens, gaps, text) {
    const pre = add(parent, 'pre', 'response', tokens === null ? text : undefined);
    (tokens || []).forEach((token, number) => addToken(pre, token, gaps[number]));
  }

  function addBlock(parent, name, text) {
    add(parent, 'div', 'name', name);
    add(parent, 'pre', '', text);
  }

  function addFolded(parent, name, text) {
    const details = add(parent, 'details');
    add(details, 'summary', '', name);
    add(details, 'pre', '', text);
  }

  function addBadge(parent, one) {
    add(parent, 'span', 'badge ' + one.badge, 'reward ' + one.reward);
  }

  function addTurn(parent, turn) {
    const block = add(parent, 'div', 'turn');
    const head = add(block, 'div', 'head');
    add(head, 'span', '', 'turn ' + turn.number);
    addBadge(head, turn);
    if (!turn.valid) add(head, 'span', '', 'no valid action');
    addResponse(block, turn.tokens, turn.gaps, turn.message);
    if (turn.teacher_context) {
      addFolded(block, 'What the teacher read of this turn', turn.teacher_context);
    }
    if (turn.observation !== null) add(block, 'pre', 'said', turn.observation);
  }

  function addEpisode(parent, card) {
    const total = card.turns.length + card.turns_left_out;
    add(parent, 'div', 'name', `Episode, ${total} turn${total > 1 ? 's' : ''}`);
    card.turns.forEach((turn, number) => {
      if (card.turns_left_out && number === card.turns.length / 2) {
        add(parent, 'p', 'note', `${card.turns_left_out} turns left out`);
      }
      addTurn(parent, turn);
    });
  }

  function addCard(card) {
    const block = add(place, 'div', 'card');
    const head = add(block, 'div', 'head');
    addBadge(head, card);
    card.head.forEach(text => add(head, 'span', '', text));
    const columns = add(block, 'div', 'columns');
    const left = add(columns, 'div'), right = add(columns, 'div');
    addBlock(left, 'Prompt', card.prompt);
    addBlock(left, 'Feedback', card.feedback);
    if (card.teacher_context) addFolded(left, 'What the teacher read', card.teacher_context);
    else add(left, 'p', 'note', 'The teacher read nothing more.');
    card.alternatives.forEach(text => addFolded(left, 'What it read of alternatives', text));
    if (card.reflection) addFolded(left, 'What the policy wrote in hindsight', card.reflection);
    if (card.turns.length) {
      addEpisode(right, card);
    } else {
      add(right, 'div', 'name', 'Response');
      addResponse(right, card.tokens, card.gaps, card.response);
    }
  }

  function draw() {
    let tokens = 0;
    const end = Math.min(drawn + AT_ONCE, chosen.length);
    while (drawn < end && tokens < TOKENS_AT_ONCE) {
      const card = chosen[drawn];
      addCard(card);
      [card, ...card.turns].forEach(one => { tokens += (one.tokens || []).length; });
      drawn += 1;
    }
    further.hidden = drawn >= chosen.length;
    const all = cards.length.toLocaleString('en');
    count.textContent = `${chosen.length.toLocaleString('en')} of ${all} match, ${drawn} drawn`;
  }

  const texts = new Map();  // of a card, in small letters: made when it is first searched
  function textOf(card) {
    if (!texts.has(card)) {
      const turns = card.turns.flatMap(
        one => [one.message, one.observation || '', one.teacher_context]);
      const response = card.tokens ? card.tokens.join('') : card.response;
      const parts = [...card.head, card.prompt, response, card.response, card.feedback,
        card.teacher_context, ...card.alternatives, card.reflection, ...turns];
      texts.set(card, parts.join('\n').toLowerCase());
    }
    return texts.get(card);
  }

  function wasTaught(card) {
    return Boolean(card.teacher_context) || card.turns.some(turn => turn.teacher_context);
  }

  function choose() {
    const text = find('text').value.toLowerCase();
    const wanted = id => find(id).value;
    chosen = cards.filter(card =>
      (!wanted('reward') || card.badge === wanted('reward')) &&
      (!wanted('taught') || wasTaught(card) === (wanted('taught') === 'yes')) &&
      (!wanted('step') || String(card.step) === wanted('step')) &&
      (!wanted('run') || String(card.run) === wanted('run')) &&
      (!text || textOf(card).includes(text)));
    place.replaceChildren();
    drawn = 0;
    draw();
  }

  new Set(cards.map(card => String(card.step))).forEach(step => {
    const option = add(find('step'), 'option', '', step === 'null' ? 'no step' : 'step ' + step);
    option.value = step;
  });
  let waiting;
  find('text').addEventListener('input', () => {
    clearTimeout(waiting);
    waiting = setTimeout(choose, 120);
  });
  ['reward', 'taught', 'step', 'run'].forEach(id => find(id).addEventListener('change', choose));
  further.addEventListener('click', draw);
  find('browser').hidden = false;
  draw();
})();

"""Builds the seccomp allow-list of a test's process, as a classic BPF program for x86-64.

A call that is not listed returns an error number, so that Python raises an exception at the same
place every time. A foreign architecture or an x32 call number kills.

A program can still compute, start threads, use its own descriptors, read files (Landlock says
which), use socket pairs and epoll (for asyncio), and send signals to itself. It cannot fork, exec,
open for writing, make sockets or send signals to others. Nor does it reach ptrace, namespaces,
mounts, keyrings, io_uring, bpf or userfaultfd. It cannot leave shared memory behind, nor raise a
resource limit.

The BPF program is a decision tree over call numbers, not a list: the kernel runs it once for every
number when it is installed. That happens for every test, and a list of the same rules costs ten
times as much there.

Sources: seccomp(2), bpf(4) (struct sock_filter), arch/x86/entry/syscalls/syscall_64.tbl of Linux.
"""

import errno
import struct

# In the place of the process's own number until the child knows it; jail.py has the same.
SELF = 0x7ABCDEF1

_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000

# offsets in struct seccomp_data; the arguments follow at 16, see `_argument_offset`
_NUMBER_OFFSET, _ARCH_OFFSET = 0, 4

# operations of BPF instructions
_LD, _JEQ, _JGE, _JSET, _JA, _AND, _RET = 0x20, 0x15, 0x35, 0x45, 0x05, 0x54, 0x06

# Outcomes: what a filter returns for a call.
_ALLOW, _KILL = 0x7FFF0000, 0x80000000


def _fail(number):
  """Returns the outcome by which a call does nothing but return this error number; 0: success."""
  return 0x00050000 | number


_FORBIDDEN = _fail(errno.EPERM)
_UNKNOWN = _fail(errno.ENOSYS)  # where the C library falls back to an older call

# Allowed whatever the arguments: names, which are for the reader, and call numbers.
_FREE = """
read 0 write 1 close 3 stat 4 fstat 5 lstat 6 poll 7 lseek 8 mmap 9 mprotect 10 munmap 11 brk 12
rt_sigaction 13 rt_sigprocmask 14 rt_sigreturn 15 pread64 17 pwrite64 18 readv 19 writev 20
access 21 pipe 22 select 23 sched_yield 24 mremap 25 msync 26 mincore 27 madvise 28 dup 32 dup2 33
pause 34 nanosleep 35 getitimer 36 alarm 37 setitimer 38 getpid 39 sendto 44 recvfrom 45
sendmsg 46 recvmsg 47 shutdown 48 getsockname 51 getpeername 52 getsockopt 55 exit 60 uname 63
fsync 74 fdatasync 75 ftruncate 77 getdents 78 getcwd 79 chdir 80 fchdir 81 readlink 89 umask 95
gettimeofday 96 getrlimit 97 getrusage 98 sysinfo 99 times 100 getuid 102 getgid 104 geteuid 107
getegid 108 getppid 110 getpgrp 111 getgroups 115 getresuid 118 getresgid 120 getpgid 121
getsid 124 rt_sigpending 127 rt_sigtimedwait 128 rt_sigsuspend 130 sigaltstack 131 statfs 137
fstatfs 138 getpriority 140 sched_getparam 143 sched_getscheduler 145 sched_get_priority_max 146
sched_get_priority_min 147 gettid 186 time 201 futex 202 sched_getaffinity 204 epoll_create 213
getdents64 217 set_tid_address 218 restart_syscall 219 clock_gettime 228 clock_getres 229
clock_nanosleep 230 exit_group 231 epoll_wait 232 epoll_ctl 233 newfstatat 262 readlinkat 267
faccessat 269 pselect6 270 ppoll 271 set_robust_list 273 epoll_pwait 281 eventfd 284 eventfd2 290
epoll_create1 291 dup3 292 pipe2 293 preadv 295 pwritev 296 getcpu 309 getrandom 318
membarrier 324 statx 332 rseq 334 close_range 436 faccessat2 439
"""

_WRITING = 0x3 | 0x40 | 0x200 | 0x400000  # O_WRONLY | O_RDWR, O_CREAT, O_TRUNC, O_TMPFILE
_THREAD = 0x00010000 | 0x00000100  # CLONE_THREAD | CLONE_VM
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ, F_GET_SEALS
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030, 1032, 1034)
_IOCTL_REQUESTS = (0x5421, 0x5450, 0x5451)  # FIONBIO, FIONCLEX, FIOCLEX
_AF_UNIX = _SOCK_STREAM = 1
_PR_SET_NAME, _PR_GET_NAME = 15, 16

# Call number -> its rules. A rule is (argument, operation, operand, outcome): "eq" applies if the
# argument equals the operand, "any" if it has any of the operand's bits, "all" if it has all of
# them, "stream" if its low four bits equal the operand. The first rule that applies decides; the
# last entry is the outcome if none does. An outcome of None goes on with the call's _SECOND rules.
_JUDGED = {
  # open, openat
  2: [(1, "any", _WRITING, _fail(errno.EACCES)), _ALLOW],
  257: [(2, "any", _WRITING, _fail(errno.EACCES)), _ALLOW],
  # openat2
  437: [_UNKNOWN],
  # clone; clone3, for which the library falls back to clone
  56: [(0, "all", _THREAD, _ALLOW), _FORBIDDEN],
  435: [_UNKNOWN],
  # execve, fork, vfork
  59: [_FORBIDDEN],
  57: [_FORBIDDEN],
  58: [_FORBIDDEN],
  # kill, tgkill
  62: [(0, "eq", SELF, _ALLOW), _FORBIDDEN],
  234: [(0, "eq", SELF, _ALLOW), _FORBIDDEN],
  # fcntl, ioctl
  72: [*((1, "eq", command, _ALLOW) for command in _FCNTL_COMMANDS), _FORBIDDEN],
  16: [*((1, "eq", request, _ALLOW) for request in _IOCTL_REQUESTS), _fail(errno.ENOTTY)],
  # socketpair
  53: [(0, "eq", _AF_UNIX, None), _fail(errno.EAFNOSUPPORT)],
  # setrlimit "succeeds": a contest idiom
  160: [_fail(0)],
  # prlimit64 likewise; without new limits (argument 2) it reads, which is real for one's own
  302: [(2, "eq", 0, None), _fail(0)],
  # prctl
  157: [(0, "eq", _PR_SET_NAME, _ALLOW), (0, "eq", _PR_GET_NAME, _ALLOW), _FORBIDDEN],
}
_SECOND = {
  53: [(1, "stream", _SOCK_STREAM, _ALLOW), _fail(errno.EAFNOSUPPORT)],  # with any flags
  302: [(0, "eq", 0, _ALLOW), (0, "eq", SELF, _ALLOW), _FORBIDDEN],
}
# Numbers from here on are of Linux 5.1 and later.
_FIRST_NEW_CALL = 424


def build() -> bytes:
  """Builds the filter: an array of struct sock_filter that holds SELF for the process number."""
  head = [
    _instruction(_LD, _ARCH_OFFSET),
    _instruction(_JEQ, _ARCH_X86_64, 1, 0),
    _instruction(_RET, _KILL),
    _instruction(_LD, _NUMBER_OFFSET),
    _instruction(_JGE, _X32_BIT, 0, 1),
    _instruction(_RET, _KILL),
  ]
  return b"".join(head + _tree(_segments()))


def _segments():
  """Returns (first call number, rules) of each run of call numbers that have the same rules."""
  free_numbers = [int(number) for number in _FREE.split()[1::2]]
  rules_of = {number: [_ALLOW] for number in free_numbers} | _JUDGED
  segments = []
  for number in range(max(rules_of) + 2):  # the last segment: all numbers beyond
    unlisted = [_FORBIDDEN] if number < _FIRST_NEW_CALL else [_UNKNOWN]
    rules = rules_of.get(number, unlisted)
    if not segments or segments[-1][1] != rules or number in _SECOND:
      segments.append((number, rules))
  return segments


def _tree(segments):
  """Returns the instructions that find a call number's segment and decide there."""
  if len(segments) == 1:
    number, rules = segments[0]
    return _decide(rules, number)
  middle = len(segments) // 2
  left, right = _tree(segments[:middle]), _tree(segments[middle:])
  # A conditional jump reaches 255 instructions: step over an unconditional one, which reaches any.
  jump_right = [_instruction(_JGE, segments[middle][0], 0, 1), _instruction(_JA, len(left))]
  return jump_right + left + right


def _decide(rules, number):
  """Returns the instructions that decide by the call's arguments; they always return."""
  instructions = []
  for rule in rules:
    if isinstance(rule, int):
      instructions.append(_instruction(_RET, rule))
      continue
    argument, operation, operand, outcome = rule
    if outcome is None:
      then = _decide(_SECOND[number], number)
    else:
      then = [_instruction(_RET, outcome)]
    instructions.append(_instruction(_LD, _argument_offset(argument)))
    if operation in ("all", "stream"):
      mask = operand if operation == "all" else 0xF
      instructions.append(_instruction(_AND, mask))
    test = _JSET if operation == "any" else _JEQ
    instructions.append(_instruction(test, operand, 0, len(then)))
    instructions += then
  return instructions


def _argument_offset(i):
  """Returns where the low half of argument i lies in struct seccomp_data."""
  return 16 + 8 * i


def _instruction(code, k, jump_true=0, jump_false=0):
  return struct.pack("<HBBI", code, jump_true, jump_false, k)

"""The seccomp allow-list of a test's process, as a classic BPF program for x86-64.

Everything that is not listed returns an error number, so that Python raises an exception at the same place every time;
a foreign architecture or an x32 call number kills. What the list leaves a program:
computing, threads, its own descriptors, reading files (Landlock says which), socket pairs and epoll for asyncio, signals to itself.
What it has no way to: fork, exec, open for writing, sockets, signals to others, ptrace, namespaces, mounts, keyrings,
io_uring, bpf, userfaultfd, shared memory that outlives it, raising a resource limit.

The program is a decision tree over call numbers, not a list: the kernel runs it once for every number when it is
installed, which happens for every test, and a list of the same rules costs ten times as much there.

Sources: seccomp(2), bpf(4) (struct sock_filter), arch/x86/entry/syscalls/syscall_64.tbl of Linux.
"""

import struct

_ARCH_X86_64 = 0xC000003E


_X32_BIT = 0x40000000


_EPERM, _EACCES, _EINVAL, _ENOTTY, _ENOSYS, _EAFNOSUPPORT = 1, 13, 22, 25, 38, 97


# struct seccomp_data: offsets of the call number, the architecture, and the low half of argument i
_NR, _ARCH = 0, 4


def _arg(i):
  return 16 + 8 * i


_LD, _JEQ, _JGE, _JSET, _JA, _AND, _RET = 0x20, 0x15, 0x35, 0x45, 0x05, 0x54, 0x06


_ALLOW, _KILL = 0x7FFF0000, 0x80000000


def _errno(number):
  return 0x00050000 | number


SELF = 0x7ABCDEF1  # stands for the process's own number until the child knows it


_FREE = """
read 0 write 1 close 3 stat 4 fstat 5 lstat 6 poll 7 lseek 8 mmap 9 mprotect 10 munmap 11 brk 12 rt_sigaction 13
rt_sigprocmask 14 rt_sigreturn 15 pread64 17 pwrite64 18 readv 19 writev 20 access 21 pipe 22 select 23 sched_yield 24
mremap 25 msync 26 mincore 27 madvise 28 dup 32 dup2 33 pause 34 nanosleep 35 getitimer 36 alarm 37 setitimer 38 getpid 39
sendto 44 recvfrom 45 sendmsg 46 recvmsg 47 shutdown 48 getsockname 51 getpeername 52 getsockopt 55 exit 60 uname 63
fsync 74 fdatasync 75 ftruncate 77 getdents 78 getcwd 79 chdir 80 fchdir 81 readlink 89 umask 95 gettimeofday 96
getrlimit 97 getrusage 98 sysinfo 99 times 100 getuid 102 getgid 104 geteuid 107 getegid 108 getppid 110 getpgrp 111
getgroups 115 getresuid 118 getresgid 120 getpgid 121 getsid 124 rt_sigpending 127 rt_sigtimedwait 128 rt_sigsuspend 130
sigaltstack 131 statfs 137 fstatfs 138 getpriority 140 sched_getparam 143 sched_getscheduler 145 sched_get_priority_max 146
sched_get_priority_min 147 gettid 186 time 201 futex 202 sched_getaffinity 204 epoll_create 213 getdents64 217
set_tid_address 218 restart_syscall 219 clock_gettime 228 clock_getres 229 clock_nanosleep 230 exit_group 231
epoll_wait 232 epoll_ctl 233 newfstatat 262 readlinkat 267 faccessat 269 pselect6 270 ppoll 271 set_robust_list 273
epoll_pwait 281 eventfd 284 eventfd2 290 epoll_create1 291 dup3 292 pipe2 293 preadv 295 pwritev 296 getcpu 309
getrandom 318 membarrier 324 statx 332 rseq 334 close_range 436 faccessat2 439
"""


# nr -> list of (argument, operation, operand, outcome); the first that applies decides, the last
# entry is the default.
# "eq": argument equals; "any": any of the bits; "all": all of the bits.
_WRITING = 0x3 | 0x40 | 0x200 | 0x400000  # O_WRONLY | O_RDWR, O_CREAT, O_TRUNC, O_TMPFILE


_THREAD = 0x00010000 | 0x00000100  # CLONE_THREAD | CLONE_VM


_JUDGED = {
  2: [(1, "any", _WRITING, _errno(_EACCES)), _ALLOW],  # open
  257: [(2, "any", _WRITING, _errno(_EACCES)), _ALLOW],  # openat
  56: [(0, "all", _THREAD, _ALLOW), _errno(_EPERM)],  # clone
  # clone3: the library falls back to clone
  435: [_errno(_ENOSYS)],
  437: [_errno(_ENOSYS)],  # openat2
  62: [(0, "eq", SELF, _ALLOW), _errno(_EPERM)],  # kill
  234: [(0, "eq", SELF, _ALLOW), _errno(_EPERM)],  # tgkill
  72: [(1, "eq", command, _ALLOW) for command in (0, 1, 2, 3, 4, 1030, 1032, 1034)]
  + [_errno(_EPERM)],
  # ^ fcntl: F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ,
  # F_GET_SEALS
  16: [(1, "eq", request, _ALLOW) for request in (0x5421, 0x5450, 0x5451)] + [_errno(_ENOTTY)],
  # ^ ioctl: FIONBIO, FIONCLEX, FIOCLEX
  # socketpair: AF_UNIX, see below
  53: [(0, "eq", 1, None), _errno(_EAFNOSUPPORT)],
  # setrlimit "succeeds": a contest idiom
  160: [_errno(0)],
  # prlimit64 likewise; reading one's own is real
  302: [(2, "eq", 0, None), _errno(0)],
  # prctl: PR_SET_NAME, PR_GET_NAME
  157: [(0, "eq", 15, _ALLOW), (0, "eq", 16, _ALLOW), _errno(_EPERM)],
  59: [_errno(_EPERM)],
  57: [_errno(_EPERM)],
  58: [_errno(_EPERM)],  # execve, fork, vfork
}


_SECOND = {  # checks behind an outcome of None
  53: [(1, "stream", 1, _ALLOW), _errno(_EAFNOSUPPORT)],  # SOCK_STREAM with any flags
  302: [(0, "eq", 0, _ALLOW), (0, "eq", SELF, _ALLOW), _errno(_EPERM)],
}


def _instruction(code, k, jump_true=0, jump_false=0):
  return struct.pack("<HBBI", code, jump_true, jump_false, k)


def _checks(rules, nr):
  """Instructions that decide by arguments and always return."""
  out = []
  for rule in rules:
    if isinstance(rule, int):
      out.append(_instruction(_RET, rule))
      continue
    argument, operation, operand, outcome = rule
    then = [_instruction(_RET, outcome)] if outcome is not None else _checks(_SECOND[nr], nr)
    out.append(_instruction(_LD, _arg(argument)))
    if operation == "eq":
      out.append(_instruction(_JEQ, operand, 0, len(then)))
    elif operation == "any":
      out.append(_instruction(_JSET, operand, 0, len(then)))
    else:
      mask = operand if operation == "all" else 0xF
      out.append(_instruction(_AND, mask))
      out.append(_instruction(_JEQ, operand, 0, len(then)))
    out += then
  return out


def build() -> bytes:
  """The filter: an array of struct sock_filter in which SELF still stands for the process number."""
  words = _FREE.split()
  free = {int(n) for n in words[1::2]}
  rules = {nr: [_ALLOW] for nr in free} | _JUDGED
  segments = []  # (first call number, its rules), merged where neighbours agree
  for nr in range(max(rules) + 2):
    rule = rules.get(nr, [_errno(_EPERM)] if nr < 424 else [_errno(_ENOSYS)])
    if not segments or segments[-1][1] != rule or nr in _SECOND:
      segments.append((nr, rule))

  def tree(lo, hi):
    if hi - lo == 1:
      return _checks(segments[lo][1], segments[lo][0])
    middle = (lo + hi) // 2
    left, right = tree(lo, middle), tree(middle, hi)
    # A conditional jump reaches 255 instructions: step over an unconditional one, which reaches
    # any.
    return (
      [_instruction(_JGE, segments[middle][0], 0, 1), _instruction(_JA, len(left))] + left + right
    )

  head = [
    _instruction(_LD, _ARCH),
    _instruction(_JEQ, _ARCH_X86_64, 1, 0),
    _instruction(_RET, _KILL),
    _instruction(_LD, _NR),
    _instruction(_JGE, _X32_BIT, 0, 1),
    _instruction(_RET, _KILL),
  ]
  return b"".join(head + tree(0, len(segments)))

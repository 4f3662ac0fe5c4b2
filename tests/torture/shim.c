/* Kills a run at the Nth call that changes a file of its folder: before it, after it, or with half of the bytes written.

     cc -shared -fPIC -O2 -pthread -o shim.so shim.c -ldl
     LD_PRELOAD=./shim.so TORTURE_CONTROL=control.bin python ...

   The control file is shared memory of all processes and threads of a run and of the test that watches it. A call counts
   while `armed` is set and where its path, or the path behind its descriptor, lies in `folder`. With `logs` set, every
   such call is also a line "number name path" at the end of the file `log`.
   Calls made inside libc itself (a buffered fwrite) or as raw system calls are not seen. What they leave on disk is what
   a kill after the call before them, or before the call behind them, leaves. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { BEFORE = 0, MIDDLE = 1, AFTER = 2 };

struct control { /* tests/torture/shim.py packs the same layout */
  _Atomic uint64_t count;  /* calls so far */
  uint64_t kill_at;        /* number of the call at which to kill, 0 for none */
  uint32_t when;
  uint32_t armed;
  uint32_t logs;
  int32_t leader;          /* process group of the run, killed with the caller's own */
  char folder[PATH_MAX];   /* absolute, without a slash at its end */
  char log[PATH_MAX];
};

static struct control *control;

__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("TORTURE_CONTROL");
  if (path == NULL) return;
  int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
  if (fd < 0) return;
  void *shared = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  syscall(SYS_close, fd);
  if (shared != MAP_FAILED) control = shared;
}

static int inside(const char *path) {
  size_t length = strlen(control->folder);
  return strncmp(path, control->folder, length) == 0 && (path[length] == '/' || path[length] == 0);
}

/* Writes the absolute path of `name` as seen from the folder behind `fd` to `out`, of PATH_MAX * 2 bytes. */
static void absolute(int fd, const char *name, char *out) {
  if (name != NULL && name[0] == '/') {
    snprintf(out, PATH_MAX * 2, "%s", name);
    return;
  }
  char link[64];
  if (fd == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
  else snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
  if (length < 0) length = 0;
  out[length] = 0;
  if (name != NULL) snprintf(out + length, PATH_MAX, "/%s", name);
}

static void die(void) {
  if (control->leader > 0) syscall(SYS_kill, -control->leader, SIGKILL);
  syscall(SYS_kill, 0, SIGKILL);
  for (;;) syscall(SYS_pause);
}

/* The call's number if it counts, else 0. Kills here where the call is not to happen any more. */
static uint64_t enter(const char *call, int fd, const char *name) {
  if (control == NULL || !control->armed) return 0;
  int saved = errno;
  char path[PATH_MAX * 2];
  absolute(fd, name, path);
  uint64_t number = 0;
  if (inside(path)) {
    number = atomic_fetch_add(&control->count, 1) + 1;
    if (control->logs) {
      char line[PATH_MAX * 2 + 64];
      int length = snprintf(line, sizeof line, "%llu %s %s\n", (unsigned long long)number, call, path);
      int log = (int)syscall(SYS_openat, AT_FDCWD, control->log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
      syscall(SYS_write, log, line, (size_t)length);
      syscall(SYS_close, log);
    }
    if (number == control->kill_at && control->when == BEFORE) die();
  }
  errno = saved;
  return number;
}

static void leave(uint64_t number) {
  if (number != 0 && number == control->kill_at && control->when == AFTER) die();
}

static int halves(uint64_t number) { return number != 0 && number == control->kill_at && control->when == MIDDLE; }


/* The calls themselves. Each is the system call; fopen alone is libc's own. */

static long done(uint64_t number, long result) {
  leave(number);
  return result;
}

ssize_t write(int fd, const void *from, size_t size) {
  uint64_t number = enter("write", fd, NULL);
  if (halves(number)) syscall(SYS_write, fd, from, size / 2), die();
  return done(number, syscall(SYS_write, fd, from, size));
}

ssize_t pwrite64(int fd, const void *from, size_t size, off64_t at) {
  uint64_t number = enter("pwrite", fd, NULL);
  if (halves(number)) syscall(SYS_pwrite64, fd, from, size / 2, at), die();
  return done(number, syscall(SYS_pwrite64, fd, from, size, at));
}

ssize_t pwrite(int fd, const void *from, size_t size, off_t at) { return pwrite64(fd, from, size, at); }

/* The middle of a vector is half of its first part. */
ssize_t writev(int fd, const struct iovec *parts, int count) {
  uint64_t number = enter("writev", fd, NULL);
  if (halves(number)) {
    if (count > 0) syscall(SYS_write, fd, parts[0].iov_base, parts[0].iov_len / 2);
    die();
  }
  return done(number, syscall(SYS_writev, fd, parts, count));
}

ssize_t sendfile64(int to, int from, off64_t *at, size_t size) {
  uint64_t number = enter("sendfile", to, NULL);
  if (halves(number)) syscall(SYS_sendfile, to, from, at, size / 2), die();
  return done(number, syscall(SYS_sendfile, to, from, at, size));
}

ssize_t sendfile(int to, int from, off_t *at, size_t size) { return sendfile64(to, from, at, size); }

ssize_t copy_file_range(int from, off64_t *read_at, int to, off64_t *write_at, size_t size, unsigned flags) {
  uint64_t number = enter("copy_file_range", to, NULL);
  if (halves(number)) syscall(SYS_copy_file_range, from, read_at, to, write_at, size / 2, flags), die();
  return done(number, syscall(SYS_copy_file_range, from, read_at, to, write_at, size, flags));
}

static int opened(const char *call, int fd, const char *name, int flags, mode_t mode) {
  uint64_t number = flags & (O_CREAT | O_TRUNC) || (flags & O_TMPFILE) == O_TMPFILE ? enter(call, fd, name) : 0;
  return (int)done(number, syscall(SYS_openat, fd, name, flags, mode));
}

#define MODE(last)                                                                  \
  mode_t mode = 0;                                                                  \
  if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {                        \
    va_list rest;                                                                   \
    va_start(rest, last);                                                           \
    mode = (mode_t)va_arg(rest, unsigned);                                          \
    va_end(rest);                                                                   \
  }

int open(const char *name, int flags, ...) { MODE(flags) return opened("open", AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE(flags) return opened("open", AT_FDCWD, name, flags, mode); }
int openat(int fd, const char *name, int flags, ...) { MODE(flags) return opened("open", fd, name, flags, mode); }
int openat64(int fd, const char *name, int flags, ...) { MODE(flags) return opened("open", fd, name, flags, mode); }
int creat(const char *name, mode_t mode) { return opened("open", AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *name, mode_t mode) { return creat(name, mode); }

static FILE *stream(const char *which, const char *name, const char *mode) {
  FILE *(*real)(const char *, const char *) = (FILE * (*)(const char *, const char *)) dlsym(RTLD_NEXT, which);
  uint64_t number = strpbrk(mode, "wa") != NULL ? enter("open", AT_FDCWD, name) : 0;
  FILE *file = real(name, mode);
  leave(number);
  return file;
}

FILE *fopen(const char *name, const char *mode) { return stream("fopen", name, mode); }
FILE *fopen64(const char *name, const char *mode) { return stream("fopen64", name, mode); }

/* A rename counts where either end lies in the folder; it is logged with the new name. */
int renameat2(int old_fd, const char *old, int new_fd, const char *new, unsigned flags) {
  uint64_t number = enter("rename", new_fd, new);
  if (number == 0) number = enter("rename", old_fd, old);
  return (int)done(number, syscall(SYS_renameat2, old_fd, old, new_fd, new, flags));
}

int renameat(int old_fd, const char *old, int new_fd, const char *new) {
  return renameat2(old_fd, old, new_fd, new, 0);
}

int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }

int unlinkat(int fd, const char *name, int flags) {
  uint64_t number = enter(flags & AT_REMOVEDIR ? "rmdir" : "unlink", fd, name);
  return (int)done(number, syscall(SYS_unlinkat, fd, name, flags));
}

int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int remove(const char *name) {
  int result = unlink(name);
  return result != 0 && errno == EISDIR ? rmdir(name) : result;
}

int mkdirat(int fd, const char *name, mode_t mode) {
  uint64_t number = enter("mkdir", fd, name);
  return (int)done(number, syscall(SYS_mkdirat, fd, name, mode));
}

int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int fsync(int fd) {
  uint64_t number = enter("fsync", fd, NULL);
  return (int)done(number, syscall(SYS_fsync, fd));
}

int fdatasync(int fd) {
  uint64_t number = enter("fsync", fd, NULL);
  return (int)done(number, syscall(SYS_fdatasync, fd));
}

int ftruncate64(int fd, off64_t size) {
  uint64_t number = enter("truncate", fd, NULL);
  return (int)done(number, syscall(SYS_ftruncate, fd, size));
}

int truncate64(const char *name, off64_t size) {
  uint64_t number = enter("truncate", AT_FDCWD, name);
  return (int)done(number, syscall(SYS_truncate, name, size));
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }
int truncate(const char *name, off_t size) { return truncate64(name, size); }

/* posix_fallocate returns its error instead of setting errno. */
int posix_fallocate64(int fd, off64_t at, off64_t size) {
  uint64_t number = enter("fallocate", fd, NULL);
  int saved = errno;
  int result = syscall(SYS_fallocate, fd, 0, at, size) == 0 ? 0 : errno;
  errno = saved;
  return (int)done(number, result);
}

int posix_fallocate(int fd, off_t at, off_t size) { return posix_fallocate64(fd, at, size); }

int fallocate64(int fd, int mode, off64_t at, off64_t size) {
  uint64_t number = enter("fallocate", fd, NULL);
  return (int)done(number, syscall(SYS_fallocate, fd, mode, at, size));
}

int fallocate(int fd, int mode, off_t at, off_t size) { return fallocate64(fd, mode, at, size); }

int linkat(int old_fd, const char *old, int new_fd, const char *new, int flags) {
  uint64_t number = enter("link", new_fd, new);
  return (int)done(number, syscall(SYS_linkat, old_fd, old, new_fd, new, flags));
}

int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

int symlinkat(const char *target, int fd, const char *name) {
  uint64_t number = enter("symlink", fd, name);
  return (int)done(number, syscall(SYS_symlinkat, target, fd, name));
}

int symlink(const char *target, const char *name) { return symlinkat(target, AT_FDCWD, name); }

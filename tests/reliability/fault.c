/* Laid under a process by LD_PRELOAD, for tests alone. Once armed, it counts the calls that change files below one folder, kills the
 * process in front of the k-th, copies the folder in front of each, and lets no byte beyond the n-th be written: ENOSPC, as a full disk
 * says. fsync is not counted: what a process leaves that dies in front of it is what it leaves in front of the next call.
 *
 *     cc -shared -fPIC -O1 -o fault.so fault.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[4096], copies[4096];
static long crash_at, full_at = -1, calls, bytes;

void fault_arm(const char *folder, long crash, long full, const char *kept) {
    snprintf(root, sizeof root, "%s", folder);
    snprintf(copies, sizeof copies, "%s", kept);
    crash_at = crash; full_at = full; calls = bytes = 0;
}
long fault_calls(void) { return calls; }
long fault_bytes(void) { return bytes; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int below(const char *path) {  /* relative paths are below: the tests' working folder is the root */
    return root[0] && path && (path[0] != '/' || strncmp(path, root, strlen(root)) == 0);
}
static int below_fd(int fd) {
    char link[64], path[4096];
    if (!root[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return path[0] == '/' && below(path);
}
static void step(void) {
    char command[9000];
    long call = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (call == crash_at) kill(getpid(), SIGKILL);
    if (!copies[0]) return;
    snprintf(command, sizeof command, "env -u LD_PRELOAD cp -a '%s' '%s/%ld'", root, copies, call);
    if (system(command) != 0) abort();
}
static long room(long wanted) {  /* how many of these bytes the disk still takes */
    long left = full_at < 0 ? wanted : full_at - bytes;
    long taken = left < wanted ? (left < 0 ? 0 : left) : wanted;
    bytes += taken;
    return taken;
}

#define WRITE(name, ARGS, PASS, COUNT)                                     \
    ssize_t name ARGS {                                                    \
        if (!below_fd(fd)) return REAL(name) PASS;                         \
        step();                                                            \
        long given = COUNT, taken = room(given);                           \
        if (taken == 0 && given > 0) { errno = ENOSPC; return -1; }        \
        COUNT = taken;                                                     \
        return REAL(name) PASS;                                            \
    }
WRITE(write, (int fd, const void *data, size_t n), (fd, data, n), n)
WRITE(pwrite, (int fd, const void *data, size_t n, off_t at), (fd, data, n, at), n)
WRITE(pwrite64, (int fd, const void *data, size_t n, off64_t at), (fd, data, n, at), n)

ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (!below_fd(fd)) return REAL(writev)(fd, parts, count);
    long done = 0;
    for (int i = 0; i < count; i++) {  /* part by part, so that a disk can fill between two of them */
        if (parts[i].iov_len == 0) continue;
        ssize_t n = write(fd, parts[i].iov_base, parts[i].iov_len);
        if (n < 0) return done ? done : -1;
        done += n;
        if ((size_t)n < parts[i].iov_len) break;
    }
    return done;
}

#define OPEN(name)                                                         \
    int name(const char *path, int flags, ...) {                           \
        va_list more; va_start(more, flags);                               \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                                      \
        if ((flags & (O_CREAT | O_TRUNC)) && below(path)) step();          \
        return REAL(name)(path, flags, mode);                              \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name)                                                       \
    int name(int dir, const char *path, int flags, ...) {                  \
        va_list more; va_start(more, flags);                               \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                                      \
        if ((flags & (O_CREAT | O_TRUNC)) && below(path)) step();          \
        return REAL(name)(dir, path, flags, mode);                         \
    }
OPENAT(openat)
OPENAT(openat64)

#define PATH(name, ARGS, PASS, AT) int name ARGS { if (below(AT)) step(); return REAL(name) PASS; }
PATH(rename, (const char *a, const char *b), (a, b), b)
PATH(renameat, (int x, const char *a, int y, const char *b), (x, a, y, b), b)
PATH(renameat2, (int x, const char *a, int y, const char *b, unsigned f), (x, a, y, b, f), b)
PATH(unlink, (const char *a), (a), a)
PATH(unlinkat, (int x, const char *a, int f), (x, a, f), a)
PATH(rmdir, (const char *a), (a), a)
PATH(mkdir, (const char *a, mode_t m), (a, m), a)
PATH(mkdirat, (int x, const char *a, mode_t m), (x, a, m), a)
PATH(truncate, (const char *a, off_t n), (a, n), a)
PATH(truncate64, (const char *a, off64_t n), (a, n), a)
#define GROW(name, off)                                                    \
    int name(int fd, off n) {                                              \
        struct stat now;                                                   \
        if (below_fd(fd)) {                                                \
            step();                                                        \
            long more = fstat(fd, &now) == 0 && n > now.st_size ? n - now.st_size : 0; \
            if (full_at >= 0 && bytes + more > full_at) { errno = ENOSPC; return -1; } \
        }                                                                  \
        return REAL(name)(fd, n);                                          \
    }
GROW(ftruncate, off_t)
GROW(ftruncate64, off64_t)

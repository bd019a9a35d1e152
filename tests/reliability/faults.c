/* Faults on demand: a library that is loaded before libc's calls and fails, tears or kills at the N-th one.

   Only calls on files below one folder count. Five of the kinds change what is on disk; "change" counts
   these five together. Every change can also be logged, in order, one line each, so that a test can tell
   what a power cut would leave. Linux only. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { READ, WRITE, SYNC, RENAME, MAKE, REMOVE, CHANGE, MODES, KINDS };

/* Shared with the processes that are forked later, so that counts outlive a kill. */
static struct shared {
    long seen[KINDS];
    long hits;
} *shared;

static char root[PATH_MAX];
static int armed_kind = -1, armed_error, armed_lasting, log_descriptor = -1;
static long armed_at;

__attribute__((constructor)) static void start(void) {
    shared = (struct shared *)syscall(SYS_mmap, NULL, sizeof *shared, PROT_READ | PROT_WRITE,
                                      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

/* error: an errno value, or 0 for SIGKILL. lasting: calls after the N-th fail too, as on a full disk. */
void fault_arm(const char *folder, const char *log, int kind, long at, int error, int lasting) {
    snprintf(root, sizeof root, "%s/", folder);
    armed_kind = kind;
    armed_at = at;
    armed_error = error;
    armed_lasting = lasting;
    if (*log) log_descriptor = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

void fault_reset(void) { memset(shared, 0, sizeof *shared); }
long fault_seen(int kind) { return shared->seen[kind]; }
long fault_hits(void) { return shared->hits; }

static int below_root(const char *path) { return *root && !strncmp(path, root, strlen(root)); }

static int descriptor_path(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return 1;
}

static int name_path(int folder, const char *name, char *path) {
    if (*name == '/') return snprintf(path, PATH_MAX, "%s", name) < PATH_MAX;
    char base[PATH_MAX];
    if (folder == AT_FDCWD) {
        if (syscall(SYS_getcwd, base, sizeof base) < 0) return 0;
    } else if (!descriptor_path(folder, base)) {
        return 0;
    }
    return snprintf(path, PATH_MAX, "%s/%s", base, name) < PATH_MAX;
}

static unsigned long inode_of(int folder, const char *path) {
    struct stat found;
    return *path && !fstatat(folder, path, &found, AT_SYMLINK_NOFOLLOW) ? found.st_ino : 0;
}

static unsigned long inode_of_parent(const char *path) {
    char parent[PATH_MAX];
    snprintf(parent, sizeof parent, "%s", path);
    char *slash = strrchr(parent, '/');
    if (!slash) return 0;
    *slash = 0;
    return inode_of(AT_FDCWD, parent);
}

/* Inodes too: some libraries rename by system calls that are not seen here. */
static void note(const char *word, const char *path, const char *other) {
    if (log_descriptor < 0) return;
    char line[3 * PATH_MAX];
    int length = snprintf(line, sizeof line, "%s\t%s\t%s\t%lu\t%lu\t%lu\n", word, path, other,
                          inode_of(AT_FDCWD, *other ? other : path), inode_of_parent(path), inode_of_parent(other));
    syscall(SYS_write, log_descriptor, line, length);
}

/* Count one call; returns 0 to go on, else the error to give. `due` tells a write that it is the one to tear. */
static int counted(int kind, int *due) {
    long number = __atomic_add_fetch(&shared->seen[kind], 1, __ATOMIC_SEQ_CST);
    if (kind != READ && kind != MODES) {
        long change = __atomic_add_fetch(&shared->seen[CHANGE], 1, __ATOMIC_SEQ_CST);
        if (armed_kind == CHANGE) number = change;
    }
    if (armed_kind != kind && !(armed_kind == CHANGE && kind != READ && kind != MODES)) return 0;
    if (number != armed_at && !(armed_lasting && number > armed_at)) return 0;
    __atomic_add_fetch(&shared->hits, 1, __ATOMIC_SEQ_CST);
    if (due && number == armed_at) *due = 1;
    else if (!armed_error) kill(getpid(), SIGKILL);
    return armed_error ? armed_error : EIO;
}

#define GIVE(error) do { errno = (error); return -1; } while (0)

static int on_descriptor(int kind, int descriptor, int *due, const char *word) {
    char path[PATH_MAX];
    if (!*root || !descriptor_path(descriptor, path) || !below_root(path)) return 0;
    int error = counted(kind, due);
    if (!error || (due && *due)) { if (word) note(word, path, ""); }
    return error;
}

static int on_name(int kind, int folder, const char *name, const char *word) {
    char path[PATH_MAX];
    if (!*root || !name_path(folder, name, path) || !below_root(path)) return 0;
    int error = counted(kind, NULL);
    if (!error && word) note(word, path, "");
    return error;
}

/* The call that fails first lets half of its bytes through, as a disk that fills up does. */
static ssize_t torn(int descriptor, const void *data, size_t size, off_t offset, int error) {
    if (size > 1) {
        if (offset < 0) syscall(SYS_write, descriptor, data, size / 2);
        else syscall(SYS_pwrite64, descriptor, data, size / 2, offset);
    }
    if (!armed_error) kill(getpid(), SIGKILL);
    GIVE(error);
}

ssize_t write(int descriptor, const void *data, size_t size) {
    int due = 0, error = on_descriptor(WRITE, descriptor, &due, "write");
    if (due) return torn(descriptor, data, size, -1, error);
    if (error) GIVE(error);
    return syscall(SYS_write, descriptor, data, size);
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset) {
    int due = 0, error = on_descriptor(WRITE, descriptor, &due, "write");
    if (due) return torn(descriptor, data, size, offset, error);
    if (error) GIVE(error);
    return syscall(SYS_pwrite64, descriptor, data, size, offset);
}
ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset) {
    return pwrite64(descriptor, data, size, offset);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    int error = on_descriptor(WRITE, descriptor, NULL, "write");
    if (error) GIVE(error);
    return syscall(SYS_writev, descriptor, parts, count);
}

ssize_t sendfile64(int target, int source, off64_t *offset, size_t size) {
    int error = on_descriptor(READ, source, NULL, NULL);
    if (!error) error = on_descriptor(WRITE, target, NULL, "write");
    if (error) GIVE(error);
    return syscall(SYS_sendfile, target, source, offset, size);
}
ssize_t sendfile(int target, int source, off_t *offset, size_t size) {
    return sendfile64(target, source, offset, size);
}

ssize_t copy_file_range(int source, off64_t *from, int target, off64_t *to, size_t size, unsigned flags) {
    int error = on_descriptor(READ, source, NULL, NULL);
    if (!error) error = on_descriptor(WRITE, target, NULL, "write");
    if (error) GIVE(error);
    return syscall(SYS_copy_file_range, source, from, target, to, size, flags);
}

int ftruncate64(int descriptor, off64_t size) {
    int error = on_descriptor(WRITE, descriptor, NULL, "write");
    if (error) GIVE(error);
    return syscall(SYS_ftruncate, descriptor, size);
}
int ftruncate(int descriptor, off_t size) { return ftruncate64(descriptor, size); }

int fsync(int descriptor) {
    int error = on_descriptor(SYNC, descriptor, NULL, "sync");
    if (error) GIVE(error);
    return syscall(SYS_fsync, descriptor);
}

int fdatasync(int descriptor) {
    int error = on_descriptor(SYNC, descriptor, NULL, "sync");
    if (error) GIVE(error);
    return syscall(SYS_fdatasync, descriptor);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    char source[PATH_MAX], target[PATH_MAX];
    if (*root && name_path(from_folder, from, source) && name_path(to_folder, to, target) && below_root(target)) {
        int error = counted(RENAME, NULL);
        if (error) GIVE(error);
        int result = syscall(SYS_renameat2, from_folder, from, to_folder, to, flags);
        if (!result) note(flags & 2 ? "exchange" : "rename", source, target);
        return result;
    }
    return syscall(SYS_renameat2, from_folder, from, to_folder, to, flags);
}
int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    return renameat2(from_folder, from, to_folder, to, 0);
}
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

/* Only what makes a file counts as a change. */
static int opened(int folder, const char *name, int flags, mode_t mode) {
    struct stat found;
    if (flags & O_CREAT && fstatat(folder, name, &found, 0)) {
        int error = on_name(MAKE, folder, name, NULL);
        if (error) GIVE(error);
        int descriptor = syscall(SYS_openat, folder, name, flags, mode);
        char path[PATH_MAX];
        if (descriptor >= 0 && *root && descriptor_path(descriptor, path) && below_root(path)) note("make", path, "");
        return descriptor;
    }
    if (flags & O_TRUNC) {
        char path[PATH_MAX];
        if (*root && name_path(folder, name, path) && below_root(path)) note("write", path, "");
    }
    return syscall(SYS_openat, folder, name, flags, mode);
}

#define MODE(flags, last) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, last); mode = va_arg(list, int); va_end(list); }

int open(const char *name, int flags, ...) { MODE(flags, flags) return opened(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE(flags, flags) return opened(AT_FDCWD, name, flags, mode); }
int openat(int folder, const char *name, int flags, ...) { MODE(flags, flags) return opened(folder, name, flags, mode); }
int openat64(int folder, const char *name, int flags, ...) { MODE(flags, flags) return opened(folder, name, flags, mode); }

int mkdirat(int folder, const char *name, mode_t mode) {
    struct stat found;
    if (fstatat(folder, name, &found, 0)) {
        int error = on_name(MAKE, folder, name, NULL);
        if (error) GIVE(error);
    }
    int result = syscall(SYS_mkdirat, folder, name, mode);
    char path[PATH_MAX];
    if (!result && *root && name_path(folder, name, path) && below_root(path)) note("make", path, "");
    return result;
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int unlinkat(int folder, const char *name, int flags) {
    struct stat found;
    if (!fstatat(folder, name, &found, AT_SYMLINK_NOFOLLOW)) {
        int error = on_name(REMOVE, folder, name, "remove");
        if (error) GIVE(error);
    }
    return syscall(SYS_unlinkat, folder, name, flags);
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int fchmodat(int folder, const char *name, mode_t mode, int flags) {
    int error = on_name(MODES, folder, name, NULL);
    if (error) GIVE(error);
    return syscall(SYS_fchmodat, folder, name, mode);
}
int chmod(const char *name, mode_t mode) { return fchmodat(AT_FDCWD, name, mode, 0); }

int fchmod(int descriptor, mode_t mode) {
    int error = on_descriptor(MODES, descriptor, NULL, NULL);
    if (error) GIVE(error);
    return syscall(SYS_fchmod, descriptor, mode);
}

ssize_t read(int descriptor, void *data, size_t size) {
    int error = on_descriptor(READ, descriptor, NULL, NULL);
    if (error) GIVE(error);
    return syscall(SYS_read, descriptor, data, size);
}
ssize_t __read_chk(int descriptor, void *data, size_t size, size_t room) {
    return room < size ? -1 : read(descriptor, data, size);
}

ssize_t pread64(int descriptor, void *data, size_t size, off64_t offset) {
    int error = on_descriptor(READ, descriptor, NULL, NULL);
    if (error) GIVE(error);
    return syscall(SYS_pread64, descriptor, data, size, offset);
}
ssize_t pread(int descriptor, void *data, size_t size, off_t offset) {
    return pread64(descriptor, data, size, offset);
}

void *mmap64(void *address, size_t size, int protection, int flags, int descriptor, off64_t offset) {
    if (descriptor >= 0) {
        int error = on_descriptor(READ, descriptor, NULL, NULL);
        if (error) { errno = error; return MAP_FAILED; }
    }
    return (void *)syscall(SYS_mmap, address, size, protection, flags, descriptor, offset);
}
void *mmap(void *address, size_t size, int protection, int flags, int descriptor, off_t offset) {
    return mmap64(address, size, protection, flags, descriptor, offset);
}

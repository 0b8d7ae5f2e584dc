/* What the tests of emulated owners do inside the container. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void owner(const char *path) {
    struct stat s;
    struct statx x;
    if (syscall(SYS_newfstatat, AT_FDCWD, path, &s, 0)) die("stat");
    printf("stat %d:%d ", s.st_uid, s.st_gid);
    if (lstat(path, &s)) die("lstat");
    printf("lstat %d:%d ", s.st_uid, s.st_gid);
    int fd = open(path, O_PATH);
    if (fd < 0 || syscall(SYS_fstat, fd, &s)) die("fstat");
    printf("fstat %d:%d ", s.st_uid, s.st_gid);
    if (syscall(SYS_newfstatat, fd, "", &s, AT_EMPTY_PATH)) die("fstatat");
    printf("empty %d:%d ", s.st_uid, s.st_gid);
    char self[64];
    snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
    /* Without /proc the descriptor itself must do. */
    if (stat(self, &s) && fstat(fd, &s)) die("stat of a descriptor");
    printf("path %d:%d ", s.st_uid, s.st_gid);
    if (statx(AT_FDCWD, path, 0, STATX_BASIC_STATS, &x)) die("statx");
    printf("statx %d:%d\n", x.stx_uid, x.stx_gid);
}

static void reuse(const char *path) {
    int good = 0;
    for (int i = 0; i < 500; i++) {
        struct stat s;
        int fd = open(path, O_CREAT | O_EXCL | O_WRONLY, 0644);
        if (fd < 0 || fstat(fd, &s)) die("open");
        good += s.st_uid == 0;
        if (fchown(fd, 33, 34)) die("fchown");
        close(fd);
        unlink(path);
    }
    printf("%d of 500 new files are root's\n", good);
}

static void number(const char *directory) {
    int dir = open(directory, O_DIRECTORY);
    for (int i = 0; i < 1000; i++) {
        char name[16];
        snprintf(name, sizeof name, "%d", i);
        if (i % 2 ? fchownat(dir, name, i + 1, i + 2, 0)
                  : fchownat(openat(dir, name, O_PATH), "", i + 1, i + 2, AT_EMPTY_PATH))
            die("fchownat");
    }
}

static void *other(void *unused) {
    syscall(SYS_setresuid, 33, 33, 33);
    printf("thread %ld ", syscall(SYS_getuid));
    return unused;
}

static void in_child(void (*what)(void)) {
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        what();
        fflush(stdout);
        _exit(0);
    }
    waitpid(pid, NULL, 0);
}

static void daemonish(void) {
    /* The parent is gone and has never been asked anything when the grandchild asks first. */
    gid_t groups[] = {6, 5};
    int end[2];
    char c;
    if (pipe(end) || setgroups(2, groups) || setresgid(44, 44, 44) || setresuid(33, 33, 33)) die("become");
    fflush(stdout);
    if (fork() == 0) {
        if (fork()) _exit(0);
        usleep(50000);
        gid_t got[8];
        int n = getgroups(8, got);
        printf("daemon's grandchild %d:%d groups %d,%d\n", getuid(), getegid(), got[0], n == 2 ? (int)got[1] : -1);
        fflush(stdout);
        _exit(0);
    }
    close(end[1]);
    (void)!read(end[0], &c, 1);
}

static void executes(void) {
    setresuid(33, 33, 33);
    execl("/bin/probe", "probe", "ids", (char *)NULL);
}

static void back(void) {
    if (seteuid(33)) die("seteuid");
    if (seteuid(0)) die("seteuid 0");
    printf("back %d\n", geteuid());
    setuid(33);
    printf("no way back %d\n", setuid(0));
}

static void kept(void) {
    prctl(PR_SET_KEEPCAPS, 1);
    if (setresuid(33, 33, 33) || setresgid(44, 44, 44)) die("setresgid");
    printf("kept %d\n", getgid());
}

static void slack(void) {
    setresuid(33, 33, 33);
    prctl(PR_SET_TIMERSLACK, 1);
    printf("slack is not lost %d\n", getuid());
}

static void credentials(void) {
    pthread_t thread;
    pthread_create(&thread, NULL, other, NULL);
    pthread_join(thread, NULL);
    printf("main %d\n", getuid());
    in_child(daemonish);
    in_child(executes);
    in_child(back);
    in_child(kept);
    in_child(slack);
}

static void capability(const char *path) {
    struct vfs_cap_data cap = {.magic_etc = VFS_CAP_REVISION_2 | VFS_CAP_FLAGS_EFFECTIVE};
    cap.data[0].permitted = 1 << 13;
    if (setxattr(path, "security.capability", &cap, sizeof cap, 0)) die("setxattr");
    printf("set, read %zd\n", getxattr(path, "security.capability", &cap, sizeof cap));
}

static const unsigned short tags[6] = {1, 2, 4, 8, 16, 32};

/* The list that `setfacl -m u:USER:rwx,g:root:rx` makes. */
static void acl(const char *path, unsigned user) {
    static const unsigned short permissions[6] = {7, 7, 5, 5, 7, 5};
    struct { unsigned short tag, permissions; unsigned id; } entry;
    char value[4 + 6 * 8] = {2};
    for (int i = 0; i < 6; i++) {
        entry.tag = tags[i], entry.permissions = permissions[i];
        entry.id = tags[i] == 2 ? user : tags[i] == 8 ? 0 : -1u;
        memcpy(value + 4 + 8 * i, &entry, 8);
    }
    errno = 0;
    (void)!setxattr(path, "system.posix_acl_access", value, sizeof value, 0);
    printf("set: %s\n", strerror(errno));
}

static void show_acl(const char *path) {
    unsigned short s[2 + 6 * 4];
    ssize_t len = getxattr(path, "system.posix_acl_access", NULL, 0);
    if (len != getxattr(path, "system.posix_acl_access", s, sizeof s)) die("size");
    if (len != sizeof s) puts("none");
    else printf("user %d of 6: %d group %d of 6: %d mask %d\n", s[2 + 4 + 2], s[2 + 4 + 1], s[2 + 12 + 2], s[2 + 12 + 1], s[2 + 16 + 1]);
}

static void nothing(int signal) {
    (void)signal;
}

static void signals(const char *path) {
    struct sigaction action = {.sa_handler = nothing, .sa_flags = SA_RESTART};
    struct itimerval often = {{0, 300}, {0, 300}};
    struct stat s;
    close(open(path, O_CREAT | O_WRONLY, 0644));
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &often, NULL);
    for (int i = 1; i < 3000; i++) {
        if (chown(path, i, i + 1)) die("chown");
        if (stat(path, &s)) die("stat");
        if (s.st_uid != (uid_t)i || s.st_gid != (gid_t)i + 1) {
            printf("wrong owner %d of %d\n", s.st_uid, i);
            exit(1);
        }
    }
    printf("no call was broken\n");
}

static const char *volatile paths[2];
static char shared[4096];

static void *flip(void *unused) {
    for (int i = 0;; i++) strcpy(shared, paths[i & 1]);
    return unused;
}

static void as_user(void) {
    if (setresgid(1001, 1001, 1001) || setresuid(1000, 1000, 1000)) die("become ada");
}

static void escape(const char *path) {
    as_user();
    close(open(path, O_CREAT | O_EXCL | O_WRONLY, 0644));
    mkdir(path, 0755);
    (void)!symlink("x", path);
    (void)!mkfifo(path, 0644);
}

static void race(const char *a, const char *b) {
    pthread_t thread;
    paths[0] = a, paths[1] = b;
    strcpy(shared, a);
    as_user();
    pthread_create(&thread, NULL, flip, NULL);
    for (int i = 0; i < 3000; i++) {
        mkdir(shared, 0755);
        rmdir(b);
    }
    exit(0);
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    const char *path = argc > 2 ? argv[2] : "";
    if (!strcmp(what, "owner")) owner(path);
    else if (!strcmp(what, "reuse")) reuse(path);
    else if (!strcmp(what, "number")) number(path);
    else if (!strcmp(what, "credentials")) credentials();
    else if (!strcmp(what, "ids")) {
        uid_t r, e, s;
        getresuid(&r, &e, &s);
        printf("exec %d %d %d\n", r, e, s);
    } else if (!strcmp(what, "capability")) capability(path);
    else if (!strcmp(what, "acl")) acl(path, atoi(argv[3]));
    else if (!strcmp(what, "acl?")) show_acl(path);
    else if (!strcmp(what, "signals")) signals(path);
    else if (!strcmp(what, "escape")) escape(path);
    else if (!strcmp(what, "race")) race(path, argv[3]);
    else if (!strcmp(what, "loop")) {
        struct stat s;
        for (;;) {
            if (chown(path, 1, 2)) die("chown");
            stat(path, &s);
        }
    } else return 2;
    return 0;
}

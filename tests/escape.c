/* Tries to reach a directory of the host by every call that a supervisor may carry out for a container, as a user of the
 * container who is not root (so that it does) and as root. usage: escape PATH...; each path names the directory by some
 * way. Or: escape --landlock DIRECTORY, escape --capabilities DIRECTORY. What comes of it is looked at from outside. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/landlock.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

static char name[8192];

static const char *in(const char *directory, const char *file) {
    static int count;
    /* A name of its own for each call, so that none fails because another was there first. */
    if (*file == '*') snprintf(name, sizeof name, "%s/%s%d", directory, file + 1, count++);
    else snprintf(name, sizeof name, "%s/%s", directory, file);
    return name;
}

static void make(int at, const char *p) {
    struct open_how how = {.flags = O_CREAT | O_WRONLY, .mode = 0644};
    const char *path = in(p, "*creat");
    struct stat s;
    if (at == AT_FDCWD) {
        syscall(SYS_creat, path, 0644);
        syscall(SYS_open, in(p, "*open"), O_CREAT | O_RDWR, 0644);
        syscall(SYS_mkdir, in(p, "*mkdir"), 0755);
        syscall(SYS_mknod, in(p, "*fifo"), S_IFIFO | 0644, 0);
        syscall(SYS_mknod, in(p, "*device"), S_IFCHR | 0644, makedev(1, 3));
        syscall(SYS_mknod, in(p, "*file"), S_IFREG | 0644, 0);
        syscall(SYS_symlink, "target", in(p, "*link"));
        syscall(SYS_chown, in(p, "suid"), 1000, 1001);
        syscall(SYS_chown, in(p, "suid"), 0, 0);
        syscall(SYS_lchown, in(p, "suid"), 7, 8);
        syscall(SYS_chown, in(p, ""), 7, 8);
        syscall(SYS_stat, in(p, "suid"), &s);
    }
    syscall(SYS_openat, at, in(p, "*openat"), O_CREAT | O_WRONLY, 0644);
    syscall(SYS_openat2, at, in(p, "*openat2"), &how, sizeof how);
    syscall(SYS_mkdirat, at, in(p, "*mkdirat"), 0755);
    syscall(SYS_mkdirat, at, in(p, "*mkdirat/"), 0755);
    syscall(SYS_mknodat, at, in(p, "*node"), S_IFSOCK | 0644, 0);
    syscall(SYS_mknodat, at, in(p, "*device"), S_IFBLK | 0644, makedev(8, 0));
    syscall(SYS_symlinkat, "target", at, in(p, "*symlinkat"));
    syscall(SYS_fchownat, at, in(p, "suid"), 9, 9, 0);
    syscall(SYS_fchownat, at, in(p, "suid"), 9, 9, AT_SYMLINK_NOFOLLOW);
    syscall(SYS_fchownat, at, in(p, "suid"), -1, 0, 0);
}

static void in_child(uid_t user, const char *start, const char *path) {
    pid_t pid = fork();
    if (pid == 0) {
        int at = AT_FDCWD;
        if (user && (setresgid(1001, 1001, 1001) || setresuid(user, user, user))) _exit(1);
        if (start && (chdir(start) || (at = open(start, O_PATH | O_DIRECTORY)) < 0)) _exit(0);
        make(AT_FDCWD, path);
        make(at, path);
        _exit(0);
    }
    int status;
    waitpid(pid, &status, 0);
    if (status) exit(1);
}

/* What a program gave up is not given back by who acts for it: a directory that it may not write stays so. */
static int rights(const char *how, const char *directory) {
    if (!strcmp(how, "--landlock")) {
        struct landlock_ruleset_attr rules = {.handled_access_fs = LANDLOCK_ACCESS_FS_MAKE_DIR};
        int fd = syscall(SYS_landlock_create_ruleset, &rules, sizeof rules, 0);
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        if (fd < 0 || syscall(SYS_landlock_restrict_self, fd, 0)) return perror("landlock"), 1;
    } else {
        struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
        struct __user_cap_data_struct none[2] = {{0}};
        if (syscall(SYS_capset, &head, none)) return perror("capset"), 1;
    }
    if (fork() == 0) {
        if (setresgid(1001, 1001, 1001) || setresuid(1000, 1000, 1000)) _exit(1);
        errno = 0;
        mkdir(in(directory, "*made"), 0755);
        printf("mkdir: %s\n", strerror(errno));
        fflush(stdout);
        _exit(0);
    }
    int status;
    return wait(&status) < 0 || status;
}

int main(int argc, char **argv) {
    static const char *const starts[] = {
        NULL, "/proc/self/root", "/proc/self", "/proc/thread-self", "/proc", "/dev/fd", "/proc/self/cwd", "/",
    };
    if (argc == 3 && !strncmp(argv[1], "--", 2)) return rights(argv[1], argv[2]);
    for (int i = 1; i < argc; i++) {
        for (unsigned j = 0; j < sizeof starts / sizeof *starts; j++) {
            in_child(1000, starts[j], argv[i]);
            in_child(0, starts[j], argv[i]);
        }
    }
    printf("tried %d\n", argc - 1);
    return 0;
}

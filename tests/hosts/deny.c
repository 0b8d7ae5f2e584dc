/* deny WHAT COMMAND...: runs a command where the kernel refuses what it refuses elsewhere.
 *
 * namespaces     unshare(2), setns(2), mount(2) and clone(2) of namespaces fail with EPERM, clone3(2) with ENOSYS: Docker's filter
 * extras         extended attributes cannot be set (EACCES, as SELinux says it); no key rings, no ptrace(2), no look into
 *                other processes (EPERM): what stricter filters add
 * landlock-proc  nothing below /proc can be written: EACCES at the id maps, as AppArmor's restriction of user
 *                namespaces (Ubuntu 23.10 and later) refuses them
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NAMESPACES 0x7e020000u
#define NR offsetof(struct seccomp_data, nr)
#define LOW(n) (offsetof(struct seccomp_data, args) + 8 * (n))
#define REFUSE(call, error) \
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (error))

static int namespaces(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, NR),
        REFUSE(SYS_unshare, EPERM), REFUSE(SYS_setns, EPERM), REFUSE(SYS_mount, EPERM), REFUSE(SYS_clone3, ENOSYS),
        REFUSE(SYS_fsopen, EPERM), REFUSE(SYS_open_tree, EPERM), REFUSE(SYS_move_mount, EPERM),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, LOW(0)),
        BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, NAMESPACES, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { sizeof code / sizeof *code, code };
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
}

static int extras(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, NR),
        REFUSE(SYS_setxattr, EACCES), REFUSE(SYS_lsetxattr, EACCES), REFUSE(SYS_fsetxattr, EACCES), REFUSE(SYS_keyctl, EPERM),
        REFUSE(SYS_ptrace, EPERM), REFUSE(SYS_process_vm_readv, EPERM), REFUSE(SYS_process_vm_writev, EPERM),
        REFUSE(SYS_pidfd_getfd, EPERM), REFUSE(SYS_kcmp, EPERM), REFUSE(SYS_io_uring_setup, EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { sizeof code / sizeof *code, code };
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
}

static int landlock_proc(void)
{
    struct landlock_ruleset_attr attr = { .handled_access_fs = LANDLOCK_ACCESS_FS_WRITE_FILE | LANDLOCK_ACCESS_FS_REFER };
    int rules = syscall(SYS_landlock_create_ruleset, &attr, sizeof attr, 0);
    const char *writable[] = { "/dev", "/home", "/mnt", "/opt", "/run", "/srv", "/tmp", "/var" };
    for (size_t i = 0; i < sizeof writable / sizeof *writable; i++) {
        struct landlock_path_beneath_attr rule = { attr.handled_access_fs, open(writable[i], O_PATH | O_CLOEXEC) };
        if (syscall(SYS_landlock_add_rule, rules, LANDLOCK_RULE_PATH_BENEATH, &rule, 0))
            return -1;
        close(rule.parent_fd);
    }
    return syscall(SYS_landlock_restrict_self, rules, 0);
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 125;
    if (geteuid() && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return 125;
    int failed = !strcmp(argv[1], "namespaces") ? namespaces() : !strcmp(argv[1], "extras") ? extras() : landlock_proc();
    if (failed) {
        perror("deny");
        return 125;
    }
    execvp(argv[2], argv + 2);
    perror(argv[2]);
    return 127;
}

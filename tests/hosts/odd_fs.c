/* odd_fs SOURCE POINT [WORD...]: shows SOURCE at POINT through FUSE, with the manners of storage that people really have.
 *
 * allow_other  others see it       delay=US  each request takes so long       hang=S  each request hangs for so long
 * noxattr      no extended attributes   nolock  no flock and no POSIX locks   nommap  no shared mapping
 * inodes       each look gives another inode number
 *
 * Root serves it in the background, and checks nothing but what the kernel checks by modes; it ends when it is unmounted.
 */
#define FUSE_USE_VERSION 31
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse3/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/xattr.h>
#include <unistd.h>

static char *source;
static int delay_us, hang_s, noxattr, nolock, nommap, inodes;
static unsigned long looks = 1000;

/* The place below SOURCE, after the wait. */
static const char *at(const char *path, char *buffer)
{
    if (hang_s)
        sleep(hang_s);
    if (delay_us)
        usleep(delay_us);
    snprintf(buffer, 4096, "%s%s", source, path);
    return buffer;
}
#define AT(path) at(path, (char[4096]){ 0 })
#define DONE(call) ((call) < 0 ? -errno : 0)

static void as_caller(void) { setfsgid(fuse_get_context()->gid); setfsuid(fuse_get_context()->uid); }
static int as_root(int result) { int kept = errno; setfsuid(0); setfsgid(0); errno = kept; return result; }
#define AS_CALLER(call) (as_caller(), as_root(DONE(call)))

static int odd_getattr(const char *path, struct stat *st, struct fuse_file_info *fi)
{
    (void)fi;
    int done = DONE(lstat(AT(path), st));
    if (inodes)
        st->st_ino = __atomic_add_fetch(&looks, 1, __ATOMIC_RELAXED);
    return done;
}
static int odd_readlink(const char *path, char *buffer, size_t size)
{
    ssize_t len = readlink(AT(path), buffer, size - 1);
    if (len < 0)
        return -errno;
    buffer[len] = 0;
    return 0;
}
static int odd_readdir(const char *path, void *buffer, fuse_fill_dir_t fill, off_t offset, struct fuse_file_info *fi, enum fuse_readdir_flags flags)
{
    (void)offset, (void)fi, (void)flags;
    DIR *dir = opendir(AT(path));
    if (!dir)
        return -errno;
    for (struct dirent *entry; (entry = readdir(dir));)
        fill(buffer, entry->d_name, NULL, 0, 0);
    closedir(dir);
    return 0;
}
static int odd_open(const char *path, struct fuse_file_info *fi)
{
    int fd = open(AT(path), fi->flags & ~O_NOFOLLOW);
    fi->fh = fd;
    fi->direct_io = nommap;
    return fd < 0 ? -errno : 0;
}
static int odd_create(const char *path, mode_t mode, struct fuse_file_info *fi)
{
    as_caller();
    int fd = open(AT(path), fi->flags | O_CREAT, mode);
    int error = errno;
    as_root(0);
    fi->fh = fd;
    fi->direct_io = nommap;
    return fd < 0 ? -error : 0;
}
static int odd_read(const char *path, char *buffer, size_t size, off_t offset, struct fuse_file_info *fi)
{
    AT(path);
    ssize_t len = pread(fi->fh, buffer, size, offset);
    return len < 0 ? -errno : len;
}
static int odd_write(const char *path, const char *buffer, size_t size, off_t offset, struct fuse_file_info *fi)
{
    AT(path);
    ssize_t len = pwrite(fi->fh, buffer, size, offset);
    return len < 0 ? -errno : len;
}
static int odd_truncate(const char *path, off_t size, struct fuse_file_info *fi) { (void)fi; return DONE(truncate(AT(path), size)); }
static int odd_release(const char *path, struct fuse_file_info *fi) { (void)path; close(fi->fh); return 0; }
static int odd_mkdir(const char *path, mode_t mode) { return AS_CALLER(mkdir(AT(path), mode)); }
static int odd_mknod(const char *path, mode_t mode, dev_t dev) { return AS_CALLER(mknod(AT(path), mode, dev)); }
static int odd_symlink(const char *to, const char *path) { return AS_CALLER(symlink(to, AT(path))); }
static int odd_unlink(const char *path) { return DONE(unlink(AT(path))); }
static int odd_rmdir(const char *path) { return DONE(rmdir(AT(path))); }
static int odd_link(const char *from, const char *to)
{
    char first[4096];
    return DONE(link(at(from, first), AT(to)));
}
static int odd_rename(const char *from, const char *to, unsigned flags)
{
    char first[4096];
    return DONE(renameat2(AT_FDCWD, at(from, first), AT_FDCWD, AT(to), flags));
}
static int odd_chmod(const char *path, mode_t mode, struct fuse_file_info *fi) { (void)fi; return DONE(chmod(AT(path), mode)); }
static int odd_chown(const char *path, uid_t uid, gid_t gid, struct fuse_file_info *fi) { (void)fi; return DONE(lchown(AT(path), uid, gid)); }
static int odd_utimens(const char *path, const struct timespec times[2], struct fuse_file_info *fi)
{
    (void)fi;
    return DONE(utimensat(AT_FDCWD, AT(path), times, AT_SYMLINK_NOFOLLOW));
}
static int odd_statfs(const char *path, struct statvfs *st) { return DONE(statvfs(AT(path), st)); }
static int odd_fsync(const char *path, int data, struct fuse_file_info *fi) { (void)path, (void)data; return DONE(fsync(fi->fh)); }
static int odd_getxattr(const char *path, const char *name, char *value, size_t size)
{
    ssize_t len = noxattr ? (errno = EOPNOTSUPP, -1) : lgetxattr(AT(path), name, value, size);
    return len < 0 ? -errno : len;
}
static int odd_setxattr(const char *path, const char *name, const char *value, size_t size, int flags)
{
    return noxattr ? -EOPNOTSUPP : DONE(lsetxattr(AT(path), name, value, size, flags));
}
static int odd_listxattr(const char *path, char *list, size_t size)
{
    ssize_t len = noxattr ? (errno = EOPNOTSUPP, -1) : llistxattr(AT(path), list, size);
    return len < 0 ? -errno : len;
}
static int odd_flock(const char *path, struct fuse_file_info *fi, int op) { (void)path, (void)fi, (void)op; return -ENOLCK; }
static int odd_lock(const char *path, struct fuse_file_info *fi, int cmd, struct flock *lock)
{
    (void)path, (void)fi, (void)cmd, (void)lock;
    return -ENOLCK;
}
static void *odd_init(struct fuse_conn_info *connection, struct fuse_config *config)
{
    (void)connection;
    config->use_ino = inodes;
    config->attr_timeout = config->entry_timeout = inodes ? 0 : 1;
    return NULL;
}

static struct fuse_operations operations = {
    .init = odd_init, .getattr = odd_getattr, .readlink = odd_readlink, .readdir = odd_readdir, .open = odd_open,
    .create = odd_create, .read = odd_read, .write = odd_write, .truncate = odd_truncate, .release = odd_release,
    .mkdir = odd_mkdir, .mknod = odd_mknod, .symlink = odd_symlink, .unlink = odd_unlink, .rmdir = odd_rmdir,
    .link = odd_link, .rename = odd_rename, .chmod = odd_chmod, .chown = odd_chown, .utimens = odd_utimens,
    .statfs = odd_statfs, .fsync = odd_fsync, .getxattr = odd_getxattr, .setxattr = odd_setxattr, .listxattr = odd_listxattr,
};

int main(int argc, char **argv)
{
    if (argc < 3)
        return 125;
    source = argv[1];
    char options[256] = "default_permissions";
    for (int i = 3; i < argc; i++) {
        if (!strcmp(argv[i], "allow_other"))
            strcat(options, ",allow_other");
        else if (sscanf(argv[i], "delay=%d", &delay_us) == 1 || sscanf(argv[i], "hang=%d", &hang_s) == 1)
            ;
        else if (!strcmp(argv[i], "noxattr"))
            noxattr = 1;
        else if (!strcmp(argv[i], "nolock"))
            nolock = 1;
        else if (!strcmp(argv[i], "nommap"))
            nommap = 1;
        else if (!strcmp(argv[i], "inodes"))
            inodes = 1;
        else
            return 125;
    }
    if (nolock) {
        operations.flock = odd_flock;
        operations.lock = odd_lock;
    }
    umask(0);
    char *arguments[] = { argv[0], argv[2], "-o", options, NULL };
    return fuse_main(4, arguments, &operations, NULL);
}

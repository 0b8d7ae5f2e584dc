/* What a process may do with each file of a directory: a line with its name, access(2) for reading, writing and
 * executing, open(2), and execve(2) or, of a directory, what its listing and a file in it say. 0 is "yes", else errno. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static int may(const char *path, int mode) { return access(path, mode) ? errno : 0; }

static int can_open(const char *path, int flags) {
    int fd = open(path, flags | O_NONBLOCK);
    if (fd < 0) return errno;
    char byte;
    if (!(flags & O_DIRECTORY) && read(fd, &byte, 1) < 0) return errno;
    close(fd);
    return 0;
}

static int can_execute(const char *path) {
    int status;
    pid_t child = fork();
    if (!child) {
        execl(path, path, NULL);
        _exit(errno);
    }
    if (waitpid(child, &status, 0) < 0 || !WIFEXITED(status)) return -1;
    return WEXITSTATUS(status);
}

int main(int argc, char **argv) {
    if (argc > 3 && (setgroups(0, NULL) || setresgid(atoi(argv[3]), atoi(argv[3]), atoi(argv[3])) ||
                     setresuid(atoi(argv[2]), atoi(argv[2]), atoi(argv[2])))) {
        perror("cannot become another user");
        return 1;
    }
    struct dirent **names;
    int count = argc > 1 && !chdir(argv[1]) ? scandir(".", &names, NULL, alphasort) : -1;
    if (count < 0) {
        perror("scandir");
        return 1;
    }
    for (int i = 0; i < count; i++) {
        const char *name = names[i]->d_name;
        struct stat s;
        if (name[0] == '.') continue;
        if (lstat(name, &s)) {
            printf("%s stat %d\n", name, errno);
            continue;
        }
        printf("%s %d %d %d ", name, may(name, R_OK), may(name, W_OK), may(name, X_OK));
        if (S_ISDIR(s.st_mode)) {
            char inner[300];
            snprintf(inner, sizeof inner, "%s/file", name);
            printf("%d %d\n", can_open(name, O_RDONLY | O_DIRECTORY), can_open(inner, O_RDONLY));
        } else {
            printf("%d %d\n", can_open(name, O_RDONLY), can_execute(name));
        }
    }
    return 0;
}

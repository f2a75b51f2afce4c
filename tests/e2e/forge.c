/* A tenant's program, as the first process of a stock container. It waits for /go, then makes a root of its own whose text
 * in the mount table is that of the runtime's with more in it:
 *   forge NAMESPACES LOWER NAME REDIRECT
 * NAMESPACES user namespaces within one another (1 or 2). LOWER "::DIR" adds a data-only lower, "DIR:" a lower on top, "" no
 * directory; whichever is named is what has that name in the container. NAME gets the marks by which the kernel would take
 * its contents from REDIRECT. When it is done, /forged is there. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

static void must(int ok, const char *what)
{
    if (ok)
        return;
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    sleep(1);
    _exit(1);
}

static void directories(const char *path)
{
    char name[4096];
    snprintf(name, sizeof name, "%s", path);
    for (char *c = name + 1; *c; c++)
        if (*c == '/') {
            *c = 0;
            mkdir(name, 0755);
            *c = '/';
        }
    mkdir(name, 0755);
}

static char *option(const char *line, const char *key)
{
    char *value = strstr(line, key);
    if (!value)
        return NULL;
    value += strlen(key);
    return strndup(value, strcspn(value, ", \n"));
}

static void text(const char *path, const char *content)
{
    int fd = open(path, O_WRONLY | O_CREAT, 0644);
    must(fd >= 0 && write(fd, content, strlen(content)) >= 0, path);
    close(fd);
}

/* A user and a mount namespace in which every id is what it is outside. */
static void namespaces(void)
{
    int begin[2], mapped[2];
    char c, path[64];
    must(!pipe(begin) && !pipe(mapped), "pipe");
    pid_t helper = fork();
    if (!helper) {
        must(read(begin[0], &c, 1) == 1, "read");
        snprintf(path, sizeof path, "/proc/%d/uid_map", getppid());
        text(path, "0 0 4294967295");
        snprintf(path, sizeof path, "/proc/%d/gid_map", getppid());
        text(path, "0 0 4294967295");
        must(write(mapped[1], "x", 1) == 1, "write");
        _exit(0);
    }
    must(!unshare(CLONE_NEWUSER | CLONE_NEWNS), "unshare");
    must(write(begin[1], "x", 1) == 1 && read(mapped[0], &c, 1) == 1, "mapping");
    waitpid(helper, NULL, 0);
    must(!mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL), "private");
}

static void marks(const char *name, const char *redirect)
{
    int fd = open(name, O_CREAT | O_WRONLY, 0644);
    must(fd >= 0 && !ftruncate(fd, 64), name);
    must(!fsetxattr(fd, "user.overlay.metacopy", "", 0, 0), "metacopy");
    must(!fsetxattr(fd, "user.overlay.redirect", redirect, strlen(redirect), 0), "redirect");
    close(fd);
}

int main(int count, char **args)
{
    char *line = NULL, *lower = NULL, *upper = NULL, top[4096], work[4200], all[16384];
    size_t size = 0;
    must(count == 5, "forge NAMESPACES LOWER NAME REDIRECT");
    while (access("/go", F_OK))
        usleep(10000);
    FILE *table = fopen("/proc/self/mountinfo", "r");
    while (table && getline(&line, &size, table) > 0)
        if (strstr(line, " / / ") && strstr(line, " overlay ")) {
            lower = option(line, "lowerdir=");
            upper = option(line, "upperdir=");
        }
    must(lower && upper, "no overlay");
    marks(args[3], args[4]);
    directories("/mnt/new");
    /* The directory of all layers, two above the upper one. */
    snprintf(top, sizeof top, "%s", upper);
    *strrchr(top, '/') = 0;
    *strrchr(top, '/') = 0;
    directories(top);
    for (int n = atoi(args[1]); n > 0; n--)
        namespaces();
    must(!mount("t", top, "tmpfs", 0, NULL), "tmpfs");
    directories(upper);
    snprintf(work, sizeof work, "%s/work", top);
    directories(work);
    must(!chdir(top), top);
    char *each = strdup(lower);
    for (char *one = strtok(each, ":"); one; one = strtok(NULL, ":"))
        directories(one);
    int data = !strncmp(args[2], "::", 2);
    if (*args[2]) {
        char *dir = strdup(data ? args[2] + 2 : args[2]);
        if (!data)
            dir[strlen(dir) - 1] = 0;
        directories(dir);
        must(!mount("t", dir, "tmpfs", 0, NULL), dir);
    }
    snprintf(all, sizeof all, "userxattr,lowerdir=%s%s%s,upperdir=%s,workdir=%s", data ? "" : args[2], lower,
             data ? args[2] : "", upper, work);
    must(!mount("overlay", "/mnt/new", "overlay", 0, all), all);
    must(!chdir("/mnt/new"), "/mnt/new");
    mkdir("old", 0755);
    mkdir("proc", 0755);
    must(!mount("/proc", "proc", NULL, MS_BIND | MS_REC, NULL), "proc");
    must(!syscall(SYS_pivot_root, ".", "old"), "pivot_root");
    must(!chdir("/"), "/");
    text("/forged", "x");
    for (;;)
        sleep(1000);
}

// Times a command by what it prints, and says how much memory it holds by then.
//
// usage: stopwatch MARKER COMMAND [ARGUMENT...]
//
// Prints, for the first byte of the command's output and for the first line that starts with MARKER,
// the nanoseconds since just before the exec; and, at the first of these that is MARKER's, the KiB
// that are resident in mappings of less than 64 MiB: all but a guest's RAM. In the lab's counting
// mode the clock counts instructions.
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/personality.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long long now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

// KiB resident in the mappings of `process` that are too small to be a guest's RAM.
static long resident_kib(pid_t process)
{
    enum { RAM_KIB = 64 << 10 };
    char path[64], line[512];
    snprintf(path, sizeof path, "/proc/%d/smaps", process);
    FILE *maps = fopen(path, "r");
    if (!maps)
        return -1;
    long size = 0, resident, sum = 0;
    while (fgets(line, sizeof line, maps)) {
        if (sscanf(line, "Size: %ld kB", &size) == 1)
            continue;
        if (sscanf(line, "Rss: %ld kB", &resident) == 1 && size < RAM_KIB)
            sum += resident;
    }
    fclose(maps);
    return sum;
}

int main(int argc, char **argv)
{
    int ends[2];
    if (argc < 3 || pipe(ends) != 0)
        return 125;
    const char *marker = argv[1];
    long long start = now_ns();
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDOUT_FILENO);
        close(ends[0]);
        close(ends[1]);
        // Where mappings lie decides how many pages of a file a fault brings in.
        personality(ADDR_NO_RANDOMIZE);
        execvp(argv[2], argv + 2);
        _exit(125);
    }
    close(ends[1]);
    char line[4096];
    size_t length = 0;
    int printed = 0, found = 0;
    for (char byte; read(ends[0], &byte, 1) == 1;) {
        if (!printed) {
            printf("first-output-ns %lld\n", now_ns() - start);
            printed = 1;
        }
        if (length + 1 < sizeof line)
            line[length++] = byte;
        line[length] = 0;
        if (!found && length == strlen(marker) && strncmp(line, marker, length) == 0) {
            printf("marker-ns %lld\n", now_ns() - start);
            printf("resident-kib %ld\n", resident_kib(child));
            found = 1;
        }
        if (byte == '\n')
            length = 0;
    }
    int status = 0;
    waitpid(child, &status, 0);
    printf("status %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    return found ? 0 : 1;
}

// Times requests to a disk, past the guest's page cache, one line a case: name and nanoseconds an
// operation. In the lab's counting mode a nanosecond is an instruction of the whole lab.
//
// usage: diskbench DEVICE [DIVISOR]     a DIVISOR leaves out all but that part of the operations
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <linux/fs.h>
#include <time.h>
#include <unistd.h>

enum { SMALL = 4096, LARGE = 1 << 20, DEPTH = 32 };

static int disk;
static uint64_t bytes;

struct load {
    const char *name;
    size_t size;
    int writes, syncs, random, depth, operations;
};

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

struct share {
    const struct load *load;
    int number;
    void *buffer;
};

// One of `depth` threads: its part of the operations, one at a time.
static void *work(void *argument)
{
    const struct share *share = argument;
    const struct load *load = share->load;
    uint64_t blocks = bytes / load->size, random = 88172645463325252u + (uint64_t)share->number;
    for (int i = 0; i < load->operations / load->depth; i++) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        uint64_t block = load->random ? random % blocks : ((uint64_t)i * (uint64_t)load->depth + (uint64_t)share->number) % blocks;
        off_t at = (off_t)(block * load->size);
        ssize_t done = load->writes ? pwrite(disk, share->buffer, load->size, at)
                                    : pread(disk, share->buffer, load->size, at);
        if (done != (ssize_t)load->size || (load->syncs && fsync(disk) != 0)) {
            perror("diskbench");
            exit(1);
        }
    }
    return NULL;
}

static void run(const struct load *load)
{
    pthread_t threads[DEPTH];
    struct share shares[DEPTH];
    for (int i = 0; i < load->depth; i++) {
        shares[i] = (struct share){.load = load, .number = i};
        if (posix_memalign(&shares[i].buffer, SMALL, load->size) != 0)
            exit(1);
        memset(shares[i].buffer, 'x', load->size);
    }
    uint64_t start = now_ns();
    for (int i = 0; i < load->depth; i++) {
        if (i > 0)
            pthread_create(&threads[i], NULL, work, &shares[i]);
    }
    work(&shares[0]);
    for (int i = 1; i < load->depth; i++)
        pthread_join(threads[i], NULL);
    printf("diskbench: %s %llu\n", load->name,
           (unsigned long long)(now_ns() - start) / (unsigned)load->operations);
    fflush(stdout);
    for (int i = 0; i < load->depth; i++)
        free(shares[i].buffer);
}

int main(int argc, char **argv)
{
    static const struct load loads[] = {
        // The first run of each kind fills caches and the image; it is shown as well.
        {"fill-1m", LARGE, 1, 0, 0, 1, 64},
        {"read-4k", SMALL, 0, 0, 1, 1, 2000},
        {"write-4k", SMALL, 1, 0, 1, 1, 2000},
        {"read-1m", LARGE, 0, 0, 0, 1, 64},
        {"write-1m", LARGE, 1, 0, 0, 1, 64},
        {"write-4k-fsync", SMALL, 1, 1, 1, 1, 500},
        {"read-4k-depth-32", SMALL, 0, 0, 1, DEPTH, 6400},
        {"write-4k-depth-32", SMALL, 1, 0, 1, DEPTH, 6400},
        {"read-1m-depth-32", LARGE, 0, 0, 0, DEPTH, 640},
        {"write-1m-depth-32", LARGE, 1, 0, 0, DEPTH, 640},
    };
    int divisor = argc == 3 ? atoi(argv[2]) : 1;
    if (argc < 2 || divisor < 1 || (disk = open(argv[1], O_RDWR | O_DIRECT)) < 0 ||
        ioctl(disk, BLKGETSIZE64, &bytes) != 0) {
        perror("diskbench");
        return 1;
    }
    for (size_t i = 0; i < sizeof loads / sizeof *loads; i++) {
        struct load load = loads[i];
        load.operations /= divisor;
        if (load.operations < load.depth)
            load.operations = load.depth;
        run(&load);
    }
    return 0;
}

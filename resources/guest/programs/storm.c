// Hammers inter-processor interrupts and timers on all CPUs and checks that nothing is lost,
// doubled or turned back.
//
// usage: storm SECONDS; prints `storm: consistent` and returns 0, or what went wrong and 1.
//
// One thread a CPU, each bound to its own. A token goes round them by futexes, so that each hand-over
// wakes a CPU that sleeps (a reschedule interrupt); it carries a count, which only its holder may
// change, and the time, which may not go back from one CPU to the next. At every hand-over the holder
// interrupts all CPUs by taking from a page, for a moment, the right to be written (a TLB shoot-down).
// On each CPU another thread writes to that page all the time: what it can still write in that moment
// shows. It also has a timer, whose expirations have to keep up with the clock.
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { MAX_CPUS = 64, PAGE = 4096 };

static const uint64_t second_ns = 1000000000, tick_ns = 2000000;

static int cpus;
static uint64_t end_ns;
static _Atomic uint32_t holder;
static uint64_t hand_overs, last_ns; // the holder's
static _Atomic uint64_t turns[MAX_CPUS];
static volatile uint64_t *page; // a counter for each CPU
static _Atomic int failed;

static void wrong(const char *what, uint64_t seen, uint64_t expected)
{
    printf("storm: wrong: %s: %llu, expected %llu\n", what, (unsigned long long)seen,
           (unsigned long long)expected);
    fflush(stdout);
    atomic_store(&failed, 1);
    _exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * second_ns + (uint64_t)now.tv_nsec;
}

static void wait_while(_Atomic uint32_t *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void bind_to(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) != 0)
        wrong("sched_setaffinity", (uint64_t)cpu, 0);
}

static void hand_over(uint32_t self)
{
    uint64_t now = now_ns();
    if (now < last_ns)
        wrong("the clock went back", now, last_ns);
    last_ns = now;
    hand_overs++;
    atomic_fetch_add(&turns[self], 1);
    // Every CPU has to give up what it remembers of the page.
    uint64_t before[MAX_CPUS], after[MAX_CPUS];
    if (mprotect((void *)page, PAGE, PROT_READ) != 0)
        wrong("mprotect", 1, 0);
    for (int i = 0; i < cpus; i++)
        before[i] = page[i];
    sched_yield();
    for (int i = 0; i < cpus; i++)
        after[i] = page[i];
    if (mprotect((void *)page, PAGE, PROT_READ | PROT_WRITE) != 0)
        wrong("mprotect", 1, 0);
    for (int i = 0; i < cpus; i++)
        if (before[i] != after[i])
            wrong("a write to a page that cannot be written", after[i], before[i]);
    atomic_store(&holder, (self + 1) % (uint32_t)cpus);
    syscall(SYS_futex, &holder, FUTEX_WAKE_PRIVATE, MAX_CPUS, NULL, NULL, 0);
}

static void *pass_token(void *argument)
{
    uint32_t self = (uint32_t)(uintptr_t)argument;
    bind_to((int)self);
    for (;;) {
        uint32_t seen = atomic_load(&holder);
        if (seen == self) {
            // The end goes round as well, so that all have had as many turns.
            int last_round = now_ns() >= end_ns && self == 0;
            if (last_round || atomic_load(&failed) == 2) {
                atomic_store(&failed, 2);
                atomic_store(&holder, self + 1);
                syscall(SYS_futex, &holder, FUTEX_WAKE_PRIVATE, MAX_CPUS, NULL, NULL, 0);
                return NULL;
            }
            hand_over(self);
        } else {
            wait_while(&holder, seen);
        }
    }
}

// A store to the page while it cannot be written: the same store again.
static void try_again(int number)
{
    (void)number;
}

// Writes to the page, and counts the expirations of a periodic timer, which the kernel may deliver
// late, not lose.
static void *count_ticks(void *argument)
{
    int cpu = (int)(uintptr_t)argument;
    bind_to(cpu);
    int timer = timerfd_create(CLOCK_MONOTONIC, 0);
    struct itimerspec every = {.it_interval = {0, (long)tick_ns}, .it_value = {0, (long)tick_ns}};
    uint64_t start = now_ns(), ticks = 0;
    timerfd_settime(timer, 0, &every, NULL);
    uint64_t armed = now_ns(), before;
    do {
        uint64_t expired;
        before = now_ns();
        if (read(timer, &expired, sizeof expired) != sizeof expired)
            wrong("a read of a timer", 0, sizeof expired);
        ticks += expired;
        for (int i = 0; i < 100; i++)
            page[cpu]++;
    } while (before < end_ns);
    uint64_t most = (now_ns() - start) / tick_ns + 1;
    if (ticks > most)
        wrong("ticks of a timer at most", ticks, most);
    uint64_t least = (before - armed) / tick_ns;
    if (ticks < least)
        wrong("ticks of a timer at least", ticks, least);
    return NULL;
}

int main(int argc, char **argv)
{
    uint64_t seconds = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    pthread_t threads[2 * MAX_CPUS];
    cpus = (int)sysconf(_SC_NPROCESSORS_ONLN);
    if (cpus < 2 || cpus > MAX_CPUS)
        wrong("the number of CPUs", (uint64_t)cpus, 2);
    signal(SIGSEGV, try_again);
    page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    end_ns = now_ns() + seconds * second_ns;
    for (int i = 0; i < cpus; i++) {
        pthread_create(&threads[2 * i], NULL, pass_token, (void *)(uintptr_t)i);
        pthread_create(&threads[2 * i + 1], NULL, count_ticks, (void *)(uintptr_t)i);
    }
    for (int i = 0; i < 2 * cpus; i++)
        pthread_join(threads[i], NULL);
    uint64_t sum = 0;
    for (int i = 0; i < cpus; i++) {
        sum += turns[i];
        if (turns[i] != turns[0])
            wrong("turns of a CPU", turns[i], turns[0]);
    }
    if (sum != hand_overs || sum == 0)
        wrong("hand-overs", hand_overs, sum);
    printf("storm: consistent, %llu hand-overs between %d CPUs\n", (unsigned long long)sum, cpus);
    return 0;
}

// Enters the kernel in every way that a program has, and checks that it arrives as what it is.
//
// usage: traps ADDRESS, the kernel's entry for system calls in hexadecimal; prints `traps: right`
// and returns 0, or what went wrong and 1.
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static sigjmp_buf back;
static volatile sig_atomic_t steps;
static volatile int last_signal;
static void *volatile last_address;

static void caught(int number, siginfo_t *info, void *context)
{
    (void)context;
    if (number == SIGTRAP) {
        steps++;
        return;
    }
    last_signal = number;
    last_address = info->si_addr;
    siglongjmp(back, 1);
}

static void expect(const char *what, int right)
{
    if (right)
        return;
    printf("traps: wrong: %s (signal %d at %p)\n", what, last_signal, last_address);
    exit(1);
}

static void expect_signal(const char *what, void (*provoke)(void *), void *argument, int number,
                          void *address)
{
    last_signal = 0;
    if (sigsetjmp(back, 1) == 0)
        provoke(argument);
    expect(what, last_signal == number && last_address == address);
}

static long by_interrupt(long number, long argument)
{
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(argument) : "memory", "r8", "r9", "r10", "r11");
    return (int)result;
}

static void jump(void *address)
{
    __asm__ volatile("jmp *%0" : : "r"(address));
}

static void store(void *address)
{
    *(volatile char *)address = 1;
}

extern char undefined_opcode[];
__asm__(".text\nundefined_opcode: ud2\n");

// Single-steps a few instructions, of which the third enters the kernel.
static void single_step(void)
{
    __asm__ volatile("pushfq\n orl $0x100, (%%rsp)\n popfq\n"
                     "nop\n mov %0, %%eax\n syscall\n nop\n"
                     "pushfq\n andl $~0x100, (%%rsp)\n popfq\n"
                     : : "i"(SYS_getpid) : "rax", "rcx", "r11", "memory", "cc");
}

int main(int argc, char **argv)
{
    void *entry = argc > 1 ? (void *)strtoull(argv[1], NULL, 16) : NULL;
    struct sigaction action = {.sa_sigaction = caught, .sa_flags = SA_SIGINFO};
    for (const int *number = (int[]){SIGSEGV, SIGILL, SIGTRAP, SIGBUS, 0}; *number; number++)
        sigaction(*number, &action, NULL);

    for (int i = 0; i < 100; i++) {
        expect("getpid by int 0x80", by_interrupt(20, 0) == getpid());
        expect("close of nothing by syscall", syscall(SYS_close, -1) == -1);
        expect("close of nothing by int 0x80", by_interrupt(6, -1) == -9);
    }
    char *guarded = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < 20; i++) {
        expect_signal("a store to a read-only page", store, guarded, SIGSEGV, guarded);
        expect_signal("a jump to a page without code", jump, guarded, SIGSEGV, guarded);
        expect_signal("a jump to the entry for system calls", jump, entry, SIGSEGV, entry);
        expect_signal("an undefined opcode", jump, undefined_opcode, SIGILL, undefined_opcode);
    }
    single_step();
    // After POPFQ: nop, mov, syscall with the nop that it returns to, pushfq, andl, popfq.
    if (steps != 6)
        printf("traps: %d steps\n", (int)steps);
    expect("single steps across a system call", steps == 6);
    puts("traps: right");
    return 0;
}

/* Moves bytes over TCP, as both ends: what the tests of networks send, and what it costs.
 *
 * usage: netbench serve PORT                     answers the others, for ever
 *        netbench send ADDRESS PORT BYTES        sends BYTES of the pattern
 *        netbench receive ADDRESS PORT BYTES     receives as many, and fails unless they are it
 *        netbench echo ADDRESS PORT COUNT        sends one byte and waits for the answer, COUNT times
 *        netbench offloads INTERFACE on|off      leaves checksums and segments to the device, or not
 *
 * send, receive and echo print "netbench: WHAT NANOSECONDS", per MiB or per echo, after a first tenth
 * that does not count. They try for ten seconds to connect. With NETBENCH_UNCHECKED in the environment
 * of an end, it does not look at what it receives.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CHUNK 65536
/* The pattern repeats after so many bytes, a prime, so that no two pieces of a stream are alike. */
#define PERIOD 65521
#define CONNECT_TRIES 100

static unsigned char pattern[PERIOD + CHUNK];
static unsigned char buffer[CHUNK];
static int unchecked;

static void die(const char *what)
{
    fprintf(stderr, "netbench: %s: %s\n", what, strerror(errno));
    exit(1);
}

static unsigned long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static struct sockaddr_in place(const char *address, const char *port)
{
    struct sockaddr_in in = { .sin_family = AF_INET, .sin_port = htons(atoi(port)) };
    if (inet_pton(AF_INET, address, &in.sin_addr) != 1)
        die("the address");
    return in;
}

static void no_delay(int fd)
{
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

static int dial(const char *address, const char *port)
{
    struct sockaddr_in in = place(address, port);
    for (int tries = 0; tries < CONNECT_TRIES; tries++) {
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(fd, (struct sockaddr *)&in, sizeof in) == 0) {
            no_delay(fd);
            return fd;
        }
        close(fd);
        usleep(100000);
    }
    die("connect");
    return -1;
}

static void put(int fd, const void *data, size_t bytes)
{
    for (const char *at = data; bytes > 0;) {
        ssize_t n = write(fd, at, bytes);
        if (n <= 0)
            die("write");
        at += n;
        bytes -= n;
    }
}

static size_t get(int fd, void *data, size_t bytes)
{
    ssize_t n = read(fd, data, bytes);
    if (n <= 0)
        die("read");
    return n;
}

static void get_all(int fd, void *data, size_t bytes)
{
    for (char *at = data; bytes > 0;) {
        size_t n = get(fd, at, bytes);
        at += n;
        bytes -= n;
    }
}

/* Sends the pattern's bytes from..to. */
static void send_range(int fd, unsigned long long from, unsigned long long to)
{
    while (from < to) {
        size_t n = to - from < CHUNK ? to - from : CHUNK;
        put(fd, pattern + from % PERIOD, n);
        from += n;
    }
}

/* Receives the pattern's bytes from..to, and checks them unless what they cost is to be known. */
static void receive_range(int fd, unsigned long long from, unsigned long long to)
{
    while (from < to) {
        size_t n = get(fd, buffer, to - from < CHUNK ? to - from : CHUNK);
        if (!unchecked && memcmp(buffer, pattern + from % PERIOD, n) != 0) {
            errno = EBADMSG;
            die("what was received");
        }
        from += n;
    }
}

/* The request: 's' the server sends, 'r' it receives, 'e' it answers bytes; then a number. */
struct request {
    unsigned char what;
    unsigned char number[8];
};

static void ask(int fd, char what, unsigned long long number)
{
    struct request request = { .what = what };
    memcpy(request.number, &number, sizeof number);
    put(fd, &request, sizeof request);
}

static void answer(int fd)
{
    struct request request;
    unsigned long long number;
    get_all(fd, &request, sizeof request);
    memcpy(&number, request.number, sizeof number);
    switch (request.what) {
    case 's':
        send_range(fd, 0, number);
        break;
    case 'r':
        receive_range(fd, 0, number);
        put(fd, "k", 1);
        break;
    case 'e':
        for (unsigned char byte; number > 0; number--) {
            get_all(fd, &byte, 1);
            put(fd, &byte, 1);
        }
    }
}

static void serve(const char *port)
{
    struct sockaddr_in in = place("0.0.0.0", port);
    int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&in, sizeof in) != 0 || listen(listener, 16) != 0)
        die("listen");
    signal(SIGCHLD, SIG_IGN);
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0)
            die("accept");
        if (fork() == 0) {
            no_delay(fd);
            answer(fd);
            exit(0);
        }
        close(fd);
    }
}

static void report(const char *what, unsigned long long start, unsigned long long count,
                   unsigned long long unit)
{
    printf("netbench: %s %llu\n", what, (now() - start) * unit / (count ? count : 1));
    fflush(stdout);
}

static void run(const char *what, int fd, unsigned long long count)
{
    unsigned long long first = count / 10, start = now();
    unsigned char byte = 'x';
    if (strcmp(what, "send") == 0) {
        ask(fd, 'r', count);
        send_range(fd, 0, first);
        start = now();
        send_range(fd, first, count);
        get_all(fd, &byte, 1);
        report(what, start, count - first, 1 << 20);
    } else if (strcmp(what, "receive") == 0) {
        ask(fd, 's', count);
        receive_range(fd, 0, first);
        start = now();
        receive_range(fd, first, count);
        report(what, start, count - first, 1 << 20);
    } else {
        ask(fd, 'e', count);
        for (unsigned long long n = 0; n < count; n++) {
            if (n == first)
                start = now();
            put(fd, &byte, 1);
            get_all(fd, &byte, 1);
        }
        report(what, start, count - first, 1);
    }
}

static void set_offloads(const char *interface, int on)
{
    static const unsigned commands[] = { ETHTOOL_STXCSUM, ETHTOOL_STSO, ETHTOOL_SGSO, ETHTOOL_SGRO };
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    for (unsigned n = 0; n < sizeof commands / sizeof *commands; n++) {
        struct ethtool_value value = { .cmd = commands[n], .data = on };
        struct ifreq request = { .ifr_data = (void *)&value };
        strncpy(request.ifr_name, interface, IFNAMSIZ - 1);
        if (ioctl(fd, SIOCETHTOOL, &request) != 0)
            die("ethtool");
    }
}

int main(int argc, char **argv)
{
    for (unsigned n = 0; n < sizeof pattern; n++)
        pattern[n] = (n % PERIOD) * 7 + (n % PERIOD) / 251;
    unchecked = getenv("NETBENCH_UNCHECKED") != NULL;
    if (argc == 3 && strcmp(argv[1], "serve") == 0)
        serve(argv[2]);
    else if (argc == 4 && strcmp(argv[1], "offloads") == 0)
        set_offloads(argv[2], strcmp(argv[3], "on") == 0);
    else if (argc == 5)
        run(argv[1], dial(argv[2], argv[3]), strtoull(argv[4], NULL, 10));
    else
        return 2;
    return 0;
}

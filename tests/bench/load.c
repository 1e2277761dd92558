// Load for a server that answers lines: one thread, epoll, every byte of every reply compared.
//
//   load PORT PID MODE CONNECTIONS REQUEST REPLY [WARM_S SECONDS]
//
// MODE blocks: each connection sends the file REQUEST, waits for the file REPLY, and begins again at once.
// MODE churn:  so many at a time connect, send REQUEST, wait for REPLY and close; `churn-reset` closes with a reset.
// MODE idle:   each connection does so once; then all stay open until standard input ends.
//
// Prints one JSON object: what came within SECONDS after the first WARM_S, and the CPU time that the kernel accounted to
// process PID (all of its threads) and to this one meanwhile. Exit status 1 if a reply was wrong or never came, or a
// connection ended.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef IP_BIND_ADDRESS_NO_PORT
#define IP_BIND_ADDRESS_NO_PORT 24
#endif

enum { EVENTS = 512, BUCKETS = 64, SOURCES = 200, OPENING_AT_ONCE = 500, LAST_REPLIES_S = 5 };

typedef struct {
  size_t length;
  char *bytes;
} text;

typedef struct {
  int fd;
  size_t sent, received;
  uint64_t begun_ns;
  bool wants_out;
} client;

static struct sockaddr_in server = {.sin_family = AF_INET};
static text request, reply;
static char *received;
static bool is_churn, is_reset, is_idle, is_ending;
static int epoll;
static uint64_t blocks, opened, latency[64 * BUCKETS];

static _Noreturn void die(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "load: ");
  vfprintf(stderr, format, arguments);
  fprintf(stderr, "\n");
  exit(1);
}

static uint64_t clock_ns(clockid_t id) {
  struct timespec now;
  if (clock_gettime(id, &now))
    die("the server has ended");
  return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static text read_file(const char *path) {
  FILE *file = fopen(path, "rb");
  struct stat status;
  if (!file || fstat(fileno(file), &status))
    die("%s: %s", path, strerror(errno));
  text read = {status.st_size, malloc(status.st_size)};
  if (!read.length || fread(read.bytes, 1, read.length, file) != read.length)
    die("%s: can't be read", path);
  fclose(file);
  return read;
}

// -- latency: buckets of 1/64 of a power of two -----------------------------------------------------------------------

static void count(uint64_t ns) {
  int power = 63 - __builtin_clzll(ns | BUCKETS);
  latency[(power - 6) * BUCKETS + ((ns >> (power - 6)) & (BUCKETS - 1))]++;
}

static double quantile_us(double share) {
  uint64_t wanted = share * blocks, seen = 0;
  for (int i = 0; i < 58 * BUCKETS; i++)
    if ((seen += latency[i]) > wanted)
      return ((uint64_t)(BUCKETS + i % BUCKETS) << (i / BUCKETS)) / 1e3;
  return 0;
}

// -- one client -------------------------------------------------------------------------------------------------------

static void watch(client *c, int operation, bool wants_out) {
  struct epoll_event event = {.events = EPOLLIN | (wants_out ? EPOLLOUT : 0), .data.ptr = c};
  if (epoll_ctl(epoll, operation, c->fd, &event))
    die("epoll_ctl: %s", strerror(errno));
  c->wants_out = wants_out;
}

static void send_rest(client *c) {
  while (c->sent < request.length) {
    ssize_t n = send(c->fd, request.bytes + c->sent, request.length - c->sent, MSG_NOSIGNAL);
    if (n < 0 && errno == EAGAIN)
      break;
    if (n < 0)
      die("send: %s", strerror(errno));
    c->sent += n;
  }
  bool is_unsent = c->sent < request.length;
  if (is_unsent != c->wants_out)
    watch(c, EPOLL_CTL_MOD, is_unsent);
}

static void begin(client *c) {
  c->sent = c->received = 0;
  c->begun_ns = clock_ns(CLOCK_MONOTONIC);
  send_rest(c);
}

// From many addresses, for each of them has no more than some ten thousand ports, and a closed one rests for a minute.
static void open_client(client *c) {
  const int on = 1;
  struct sockaddr_in source = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(0x7f000001 + opened++ % SOURCES)};
  if ((c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)) < 0)
    die("socket: %s", strerror(errno));
  c->begun_ns = clock_ns(CLOCK_MONOTONIC);
  c->sent = c->received = 0;
  setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
  setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  if (bind(c->fd, (struct sockaddr *)&source, sizeof source))
    die("bind: %s", strerror(errno));
  if (connect(c->fd, (struct sockaddr *)&server, sizeof server) && errno != EINPROGRESS)
    die("connect: %s", strerror(errno));
  watch(c, EPOLL_CTL_ADD, true);
}

static void close_client(client *c) {
  const struct linger reset = {1, 0};
  if (is_reset)
    setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
  close(c->fd);
}

// Whether the whole reply is there.
static bool receive(client *c) {
  ssize_t n = recv(c->fd, received, reply.length + 1, 0);
  if (n < 0 && errno == EAGAIN)
    return false;
  if (n <= 0)
    die("a connection was ended: %s", n ? strerror(errno) : "end of stream");
  if (c->received + n > reply.length || memcmp(received, reply.bytes + c->received, n))
    die("a reply was wrong");
  c->received += n;
  return c->received == reply.length;
}

static void answered(client *c, uint64_t now_ns) {
  count(now_ns - c->begun_ns);
  blocks++;
  if (is_ending)
    return;
  if (is_churn) {
    close_client(c);
    open_client(c);
  } else if (!is_idle) {
    begin(c);
  }
}

static void turn(void) {
  struct epoll_event events[EVENTS];
  int n = epoll_wait(epoll, events, EVENTS, 1000);
  uint64_t now_ns = clock_ns(CLOCK_MONOTONIC);
  for (int i = 0; i < n; i++) {
    client *c = events[i].data.ptr;
    if (events[i].events & EPOLLOUT)
      send_rest(c);
    if (events[i].events & ~EPOLLOUT && receive(c))
      answered(c, now_ns);
  }
}

// -- the whole --------------------------------------------------------------------------------------------------------

static void open_all(client *clients, int connections) {
  for (int i = 0; i < connections; i++) {
    open_client(&clients[i]);
    while (is_idle && opened - blocks > OPENING_AT_ONCE) // no more than a backlog takes
      turn();
  }
}

static void stay_idle(uint64_t connections) {
  while (blocks < connections)
    turn();
  printf("{\"connections\": %lu}\n", connections);
  fflush(stdout);
  while (getchar() != EOF)
    ;
}

// Each client waits for one: without a look at the last of all, one that waits for ever would be missed among many.
static void await_last_replies(uint64_t connections) {
  uint64_t awaited = blocks + connections, end_ns = clock_ns(CLOCK_MONOTONIC) + LAST_REPLIES_S * 1000000000ull;
  is_ending = true;
  while (blocks < awaited) {
    turn();
    if (clock_ns(CLOCK_MONOTONIC) > end_ns)
      die("%lu replies never came", awaited - blocks);
  }
}

static void measure(clockid_t server_cpu, double seconds, uint64_t connections) {
  blocks = 0;
  memset(latency, 0, sizeof latency);
  uint64_t began_ns = clock_ns(CLOCK_MONOTONIC), end_ns = began_ns + seconds * 1e9, now_ns;
  uint64_t server_ns = clock_ns(server_cpu), own_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
  do
    turn();
  while ((now_ns = clock_ns(CLOCK_MONOTONIC)) < end_ns);
  server_ns = clock_ns(server_cpu) - server_ns;
  own_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - own_ns;
  if (!blocks)
    die("no reply within %g s", seconds);
  uint64_t counted = blocks;
  double p50_us = quantile_us(0.5), p99_us = quantile_us(0.99);
  await_last_replies(connections);
  printf("{\"blocks\": %lu, \"seconds\": %.6f, \"server_cpu_s\": %.6f, \"load_cpu_s\": %.6f, \"p50_us\": %.1f, \"p99_us\": %.1f}\n",
         counted, (now_ns - began_ns) / 1e9, server_ns / 1e9, own_ns / 1e9, p50_us, p99_us);
}

int main(int argc, char **argv) {
  clockid_t server_cpu;
  if (argc != 7 && argc != 9)
    die("usage: load PORT PID MODE CONNECTIONS REQUEST REPLY [WARM_S SECONDS]");
  server.sin_port = htons(atoi(argv[1]));
  server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (clock_getcpuclockid(atoi(argv[2]), &server_cpu))
    die("no process %s", argv[2]);
  is_idle = !strcmp(argv[3], "idle");
  is_reset = !strcmp(argv[3], "churn-reset");
  is_churn = is_reset || !strcmp(argv[3], "churn");
  int connections = atoi(argv[4]);
  request = read_file(argv[5]);
  reply = read_file(argv[6]);
  received = malloc(reply.length + 1);
  client *clients = calloc(connections, sizeof *clients);
  epoll = epoll_create1(EPOLL_CLOEXEC);
  struct rlimit files;
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  open_all(clients, connections);
  if (is_idle) {
    stay_idle(connections);
    return 0;
  }
  uint64_t warm_ns = clock_ns(CLOCK_MONOTONIC) + atof(argv[7]) * 1e9;
  while (clock_ns(CLOCK_MONOTONIC) < warm_ns)
    turn();
  measure(server_cpu, atof(argv[8]), connections);
  return 0;
}

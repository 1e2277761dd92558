// Load for a line server: one thread, epoll, and every byte of every reply compared.
//
//   load [-s] PORT PID MODE CONNECTIONS REQUEST REPLY [WARM_S SECONDS [RATE]]
//
// MODE blocks: each connection sends the file REQUEST, waits for the file REPLY, and sends again at once.
// MODE churn:  CONNECTIONS at a time connect, send REQUEST, wait for REPLY and close; `churn-reset` closes with a reset.
// MODE rate:   RATE requests a second, evenly spaced, to one connection after the other, whether replies have come or not
//              (an open loop). A latency counts from the moment at which the request was due, so a stall of the server
//              (or of the load) shows in every request that was due meanwhile. None is skipped.
// MODE idle:   each connection is answered once; then all stay open until standard input ends.
//
// The load spins, because one that sleeps makes a slow server pay for waking it. -s lets it sleep, for a machine on which
// it shares a core with the server.
//
// Prints one JSON object: the replies within SECONDS after the first WARM_S, and the CPU time that the kernel accounted to
// process PID (all of its threads) and to the load meanwhile. Exit status 1 if a reply was wrong or never came, or if a
// connection ended.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
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

enum { EVENTS = 512, BUCKETS = 64, SOURCES = 200, OPENING_AT_ONCE = 500, LAST_REPLIES_S = 12, SPARE_BYTES = 65536 };

static const uint64_t SECOND_NS = 1000000000;

typedef struct {
  size_t length;
  char *bytes;
} text;

typedef struct {
  int fd;
  size_t asked, sent, received; // requests; bytes of them; bytes of replies
  uint64_t begun_ns;
  bool wants_out;
} client;

static struct sockaddr_in server = {.sin_family = AF_INET};
static text request, reply;
static char *received;
static size_t received_bytes;
static client *clients;
static bool is_churn, is_reset, is_idle, is_rate, is_ending, is_sleeping;
static int epoll;
static uint64_t blocks, opened, latency[64 * BUCKETS];
static struct {
  double gap_ns;
  uint64_t began_ns, due, warm, total; // requests: due so far, not measured at the beginning, all
} rate;

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
  return now.tv_sec * SECOND_NS + now.tv_nsec;
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
  uint64_t counted = 0, seen = 0;
  for (int i = 0; i < 58 * BUCKETS; i++)
    counted += latency[i];
  uint64_t wanted = share * counted;
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
  while (c->sent < c->asked * request.length) {
    size_t place = c->sent % request.length;
    ssize_t n = send(c->fd, request.bytes + place, request.length - place, MSG_NOSIGNAL);
    if (n < 0 && errno == EAGAIN)
      break;
    if (n < 0)
      die("send: %s", strerror(errno));
    c->sent += n;
  }
  bool is_unsent = c->sent < c->asked * request.length;
  if (is_unsent != c->wants_out)
    watch(c, EPOLL_CTL_MOD, is_unsent);
}

static void begin(client *c) {
  c->asked = 1;
  c->sent = c->received = 0;
  c->begun_ns = clock_ns(CLOCK_MONOTONIC);
  send_rest(c);
}

// From many addresses: each has some ten thousand ports, and a port rests for a minute after its connection has closed.
static void open_client(client *c) {
  const int on = 1;
  struct sockaddr_in source = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(0x7f000001 + opened++ % SOURCES)};
  if ((c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)) < 0)
    die("socket: %s", strerror(errno));
  c->begun_ns = clock_ns(CLOCK_MONOTONIC);
  c->asked = !is_rate;
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

// The number of replies that became complete.
static uint64_t receive(client *c) {
  ssize_t n = recv(c->fd, received, received_bytes, 0);
  if (n < 0 && errno == EAGAIN)
    return 0;
  if (n <= 0)
    die("a connection was ended: %s", n ? strerror(errno) : "end of stream");
  size_t before = c->received, length = n;
  if (before + length > c->asked * reply.length)
    die("a reply was wrong");
  for (size_t done = 0; done < length;) {
    size_t place = (before + done) % reply.length;
    size_t part = reply.length - place < length - done ? reply.length - place : length - done;
    if (memcmp(received + done, reply.bytes + place, part))
      die("a reply was wrong");
    done += part;
  }
  c->received += length;
  return c->received / reply.length - before / reply.length;
}

static void answered(client *c, uint64_t now_ns) {
  blocks++;
  if (is_ending)
    return;
  count(now_ns - c->begun_ns);
  if (is_churn) {
    close_client(c);
    open_client(c);
  } else if (!is_idle) {
    begin(c);
  }
}

// -- at a fixed rate ---------------------------------------------------------------------------------------------------

// Request number i goes to client i % CONNECTIONS, so a client and the number of its reply tell when that was due.
static uint64_t due_ns(uint64_t i) { return rate.began_ns + i * rate.gap_ns; }

static void answered_at_rate(client *c, uint64_t replies, uint64_t now_ns) {
  uint64_t last = c->received / reply.length;
  for (uint64_t number = last - replies; number < last; number++) {
    uint64_t i = number * opened + (c - clients);
    blocks++;
    if (i >= rate.warm)
      count(now_ns - due_ns(i));
  }
}

static void send_due(void) {
  uint64_t now_ns = clock_ns(CLOCK_MONOTONIC);
  for (; rate.due < rate.total && due_ns(rate.due) <= now_ns; rate.due++) {
    client *c = &clients[rate.due % opened];
    c->asked++;
    if (!c->wants_out)
      send_rest(c);
  }
}

// -- one turn ----------------------------------------------------------------------------------------------------------

// Handle what is ready; sleep for at most most_ns if nothing is and the load may sleep.
static void turn(uint64_t most_ns) {
  struct epoll_event events[EVENTS];
  if (is_sleeping) {
    struct pollfd ready = {.fd = epoll, .events = POLLIN};
    ppoll(&ready, 1, &(struct timespec){most_ns / SECOND_NS, most_ns % SECOND_NS}, NULL);
  }
  int n = epoll_wait(epoll, events, EVENTS, 0);
  uint64_t now_ns = clock_ns(CLOCK_MONOTONIC);
  for (int i = 0; i < n; i++) {
    client *c = events[i].data.ptr;
    if (events[i].events & EPOLLOUT)
      send_rest(c);
    if (!(events[i].events & ~EPOLLOUT))
      continue;
    uint64_t replies = receive(c);
    if (is_rate)
      answered_at_rate(c, replies, now_ns);
    else if (replies)
      answered(c, now_ns);
  }
}

// -- the whole --------------------------------------------------------------------------------------------------------

static void open_all(int connections) {
  for (int i = 0; i < connections; i++) {
    open_client(&clients[i]);
    while (is_idle && opened - blocks > OPENING_AT_ONCE) // no more than a backlog takes
      turn(SECOND_NS);
  }
}

static void stay_idle(uint64_t connections) {
  while (blocks < connections)
    turn(SECOND_NS);
  printf("{\"connections\": %lu}\n", connections);
  fflush(stdout);
  while (getchar() != EOF)
    ;
}

static void await_replies(uint64_t awaited) {
  uint64_t end_ns = clock_ns(CLOCK_MONOTONIC) + LAST_REPLIES_S * SECOND_NS;
  while (blocks < awaited) {
    turn(SECOND_NS);
    if (clock_ns(CLOCK_MONOTONIC) > end_ns)
      die("%lu replies never came", awaited - blocks);
  }
}

static void tell(uint64_t counted, uint64_t ns, uint64_t server_ns, uint64_t own_ns) {
  printf("{\"blocks\": %lu, \"seconds\": %.6f, \"server_cpu_s\": %.6f, \"load_cpu_s\": %.6f, "
         "\"p50_us\": %.1f, \"p99_us\": %.1f, \"p999_us\": %.1f}\n",
         counted, ns / 1e9, server_ns / 1e9, own_ns / 1e9, quantile_us(0.5), quantile_us(0.99), quantile_us(0.999));
}

static void measure(clockid_t server_cpu, double warm_s, double seconds, uint64_t connections) {
  uint64_t warm_ns = clock_ns(CLOCK_MONOTONIC) + warm_s * SECOND_NS;
  while (clock_ns(CLOCK_MONOTONIC) < warm_ns)
    turn(SECOND_NS);
  blocks = 0;
  memset(latency, 0, sizeof latency);
  uint64_t began_ns = clock_ns(CLOCK_MONOTONIC), end_ns = began_ns + seconds * SECOND_NS, now_ns;
  uint64_t server_ns = clock_ns(server_cpu), own_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
  do
    turn(SECOND_NS);
  while ((now_ns = clock_ns(CLOCK_MONOTONIC)) < end_ns || (!blocks && now_ns < end_ns + LAST_REPLIES_S * SECOND_NS));
  server_ns = clock_ns(server_cpu) - server_ns;
  own_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - own_ns;
  if (!blocks)
    die("no reply within %g s", seconds + LAST_REPLIES_S);
  uint64_t counted = blocks;
  // Each client waits for one more. Among many, one that waits for ever would not be noticed otherwise.
  is_ending = true;
  await_replies(blocks + connections);
  tell(counted, now_ns - began_ns, server_ns, own_ns);
}

static void run_until_due(uint64_t i) {
  uint64_t now_ns;
  while ((now_ns = clock_ns(CLOCK_MONOTONIC)) < due_ns(i)) {
    send_due();
    uint64_t next_ns = rate.due < i ? due_ns(rate.due) : due_ns(i);
    turn(next_ns > now_ns ? next_ns - now_ns : 0);
  }
  send_due();
}

static void measure_rate(clockid_t server_cpu, double warm_s, double seconds, double per_s) {
  rate.gap_ns = SECOND_NS / per_s;
  rate.warm = warm_s * per_s;
  rate.total = (warm_s + seconds) * per_s;
  rate.began_ns = clock_ns(CLOCK_MONOTONIC);
  run_until_due(rate.warm);
  uint64_t began_ns = clock_ns(CLOCK_MONOTONIC);
  uint64_t server_ns = clock_ns(server_cpu), own_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
  run_until_due(rate.total);
  server_ns = clock_ns(server_cpu) - server_ns;
  own_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - own_ns;
  uint64_t ns = clock_ns(CLOCK_MONOTONIC) - began_ns;
  await_replies(rate.total);
  tell(rate.total - rate.warm, ns, server_ns, own_ns);
}

int main(int argc, char **argv) {
  clockid_t server_cpu;
  if (argc > 1 && !strcmp(argv[1], "-s")) {
    is_sleeping = true;
    argv++;
    argc--;
  }
  is_idle = argc > 3 && !strcmp(argv[3], "idle");
  is_rate = argc > 3 && !strcmp(argv[3], "rate");
  if (argc != (is_idle ? 7 : is_rate ? 10 : 9))
    die("usage: load [-s] PORT PID MODE CONNECTIONS REQUEST REPLY [WARM_S SECONDS [RATE]]");
  server.sin_port = htons(atoi(argv[1]));
  server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (clock_getcpuclockid(atoi(argv[2]), &server_cpu))
    die("no process %s", argv[2]);
  is_reset = !strcmp(argv[3], "churn-reset");
  is_churn = is_reset || !strcmp(argv[3], "churn");
  int connections = atoi(argv[4]);
  request = read_file(argv[5]);
  reply = read_file(argv[6]);
  received_bytes = reply.length + SPARE_BYTES;
  received = malloc(received_bytes);
  clients = calloc(connections, sizeof *clients);
  epoll = epoll_create1(EPOLL_CLOEXEC);
  struct rlimit files;
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  open_all(connections);
  if (is_idle)
    stay_idle(connections);
  else if (is_rate)
    measure_rate(server_cpu, atof(argv[7]), atof(argv[8]), atof(argv[9]));
  else
    measure(server_cpu, atof(argv[7]), atof(argv[8]), connections);
  return 0;
}

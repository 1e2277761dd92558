// The practical limit: one thread, epoll, ASCII letters upper-cased in place. It knows no lines, no UTF-8 and no limits.
//
//   limit PORT
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CHUNK_BYTES = 1 << 18, EVENTS = 512, BACKLOG = 4096 };

typedef struct {
  int fd;
  char *unsent; // what the kernel did not take; nothing is read meanwhile
  size_t length, sent;
} client;

static char chunk[CHUNK_BYTES];
static int epoll;

static void watch(client *c, int operation, unsigned events) {
  struct epoll_event event = {.events = events, .data.ptr = c};
  if (epoll_ctl(epoll, operation, c->fd, &event)) {
    perror("limit: epoll_ctl");
    exit(1);
  }
}

static void drop(client *c) {
  close(c->fd);
  free(c->unsent);
  free(c);
}

static void accept_all(int listener) {
  const int on = 1;
  int fd;
  while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    client *c = calloc(1, sizeof *c);
    c->fd = fd;
    watch(c, EPOLL_CTL_ADD, EPOLLIN);
  }
}

static void upper(char *bytes, size_t length) {
  for (size_t i = 0; i < length; i++)
    bytes[i] -= (unsigned char)(bytes[i] - 'a') < 26 ? 'a' - 'A' : 0;
}

static void answer(client *c) {
  ssize_t length = read(c->fd, chunk, sizeof chunk), sent;
  if (length < 0 && errno == EAGAIN)
    return;
  if (length <= 0) {
    drop(c);
    return;
  }
  upper(chunk, length);
  sent = write(c->fd, chunk, length);
  if (sent == length)
    return;
  c->sent = 0;
  c->length = length - (sent < 0 ? 0 : sent);
  c->unsent = malloc(c->length);
  memcpy(c->unsent, chunk + length - c->length, c->length);
  watch(c, EPOLL_CTL_MOD, EPOLLOUT);
}

static void send_rest(client *c) {
  ssize_t sent = write(c->fd, c->unsent + c->sent, c->length - c->sent);
  if (sent < 0 && errno != EAGAIN) {
    drop(c);
    return;
  }
  c->sent += sent < 0 ? 0 : sent;
  if (c->sent == c->length) {
    free(c->unsent);
    c->unsent = NULL;
    watch(c, EPOLL_CTL_MOD, EPOLLIN);
  }
}

int main(int argc, char **argv) {
  const int on = 1;
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  struct epoll_event events[EVENTS];
  struct rlimit files;
  signal(SIGPIPE, SIG_IGN);
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  client listener = {.fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)};
  address.sin_port = htons(argc == 2 ? atoi(argv[1]) : 0);
  setsockopt(listener.fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (bind(listener.fd, (struct sockaddr *)&address, sizeof address) || listen(listener.fd, BACKLOG)) {
    perror("limit: listen");
    return 1;
  }
  epoll = epoll_create1(EPOLL_CLOEXEC);
  watch(&listener, EPOLL_CTL_ADD, EPOLLIN);
  for (;;) {
    int n = epoll_wait(epoll, events, EVENTS, -1);
    for (int i = 0; i < n; i++) {
      client *c = events[i].data.ptr;
      if (c == &listener)
        accept_all(listener.fd);
      else if (c->unsent)
        send_rest(c);
      else
        answer(c);
    }
  }
}

// Load for a line server that speaks TLS 1.3: a goroutine a connection, and every byte of every reply compared.
//
//	load_tls PORT PID[,PID...] MODE CONNECTIONS REQUEST REPLY WARM_S SECONDS
//
// The modes, the arguments and the output are those of load.c, with two differences: PID may be several processes, whose
// CPU time is added, and a client of `churn-reset` makes a full handshake each time. It verifies no certificate, because
// that would be the client's cost. It sleeps where load.c spins, because Go's network poller does.
package main

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

var (
	address        string
	request, reply []byte
	config         = &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
	isEnding       atomic.Bool
	lock           sync.Mutex
	latencies      []float64 // in µs
	opened         atomic.Uint32
)

func cpu(pids []int) (total time.Duration) {
	for _, pid := range pids {
		var now syscall.Timespec
		clock := ^pid<<3 | 2 // as clock_getcpuclockid(3) makes it
		if _, _, err := syscall.Syscall(syscall.SYS_CLOCK_GETTIME, uintptr(clock), uintptr(unsafe.Pointer(&now)), 0); err != 0 {
			log.Fatal("the server has ended")
		}
		total += time.Duration(now.Nano())
	}
	return
}

// From many addresses, as load.c does.
func open() *tls.Conn {
	source := &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(1+opened.Add(1)%200))}
	dialer := net.Dialer{LocalAddr: source, Timeout: 20 * time.Second}
	conn, err := tls.DialWithDialer(&dialer, "tcp", address, config)
	if err != nil {
		log.Fatal("connect: ", err)
	}
	return conn
}

func roundTrip(conn *tls.Conn, room []byte) {
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := conn.Write(request); err != nil {
		log.Fatal("send: ", err)
	}
	if _, err := io.ReadFull(conn, room); err != nil {
		log.Fatal("a connection was ended: ", err)
	}
	if !bytes.Equal(room, reply) {
		log.Fatal("a reply was wrong")
	}
}

func run(isChurn bool) {
	room := make([]byte, len(reply))
	var conn *tls.Conn
	for !isEnding.Load() {
		begun := time.Now()
		if conn == nil {
			conn = open()
		}
		roundTrip(conn, room)
		lock.Lock()
		latencies = append(latencies, float64(time.Since(begun))/1e3)
		lock.Unlock()
		if isChurn {
			conn.NetConn().(*net.TCPConn).SetLinger(0)
			conn.NetConn().Close()
			conn = nil
		}
	}
}

func number(text string) float64 {
	value, err := strconv.ParseFloat(text, 64)
	if err != nil {
		log.Fatal(err)
	}
	return value
}

func read(path string) []byte {
	content, err := os.ReadFile(path)
	if err != nil {
		log.Fatal(err)
	}
	return content
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("load_tls: ")
	arguments := os.Args[1:]
	if len(arguments) != 8 {
		log.Fatal("usage: load_tls PORT PID[,PID...] MODE CONNECTIONS REQUEST REPLY WARM_S SECONDS")
	}
	address = "127.0.0.1:" + arguments[0]
	var pids []int
	for _, pid := range strings.Split(arguments[1], ",") {
		pids = append(pids, int(number(pid)))
	}
	request, reply = read(arguments[4]), read(arguments[5])
	var clients sync.WaitGroup
	for i := 0; i < int(number(arguments[3])); i++ {
		clients.Add(1)
		go func() {
			defer clients.Done()
			run(arguments[2] == "churn-reset")
		}()
	}
	time.Sleep(time.Duration(number(arguments[6]) * 1e9))
	lock.Lock()
	latencies = nil
	began, before := time.Now(), cpu(pids)
	lock.Unlock()
	time.Sleep(time.Duration(number(arguments[7]) * 1e9))
	lock.Lock()
	seconds, used := time.Since(began).Seconds(), cpu(pids)-before
	counted := append([]float64(nil), latencies...)
	lock.Unlock()
	isEnding.Store(true)
	clients.Wait() // each for one more reply
	if len(counted) == 0 {
		log.Fatal("no reply in time")
	}
	sort.Float64s(counted)
	quantile := func(share float64) float64 { return counted[int(share*float64(len(counted)))] }
	fmt.Printf("{\"blocks\": %d, \"seconds\": %.6f, \"server_cpu_s\": %.6f, \"p50_us\": %.1f, \"p99_us\": %.1f, \"p999_us\": %.1f}\n",
		len(counted), seconds, used.Seconds(), quantile(0.5), quantile(0.99), quantile(0.999))
}

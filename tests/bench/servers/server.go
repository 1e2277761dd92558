// As a Go programmer would write it: a goroutine a connection, buffered reading, replies flushed when no line waits.
//
//	server PORT
package main

import (
	"bufio"
	"bytes"
	"log"
	"net"
	"os"
)

func serve(conn net.Conn) {
	defer conn.Close()
	reader := bufio.NewReader(conn)
	writer := bufio.NewWriter(conn)
	for {
		line, err := reader.ReadSlice('\n') // as long as its buffer at most: no copy is made
		if err != nil {
			return
		}
		writer.Write(bytes.ToUpper(bytes.TrimSpace(line)))
		writer.WriteByte('\n')
		if reader.Buffered() == 0 && writer.Flush() != nil {
			return
		}
	}
}

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go serve(conn)
	}
}

// As a Node programmer would write it, a chunk at a time: what is whole of it is answered with one write.
//
//   node server.js PORT
"use strict";
const net = require("node:net");

const server = net.createServer({ noDelay: true }, (socket) => {
  let unfinished = "";
  socket.setEncoding("utf8");
  socket.on("data", (chunk) => {
    const lines = (unfinished + chunk).split("\n");
    unfinished = lines.pop();
    if (lines.length > 0) socket.write(lines.map((line) => line.trim().toUpperCase() + "\n").join(""));
  });
  socket.on("error", () => socket.destroy());
});

server.listen({ port: Number(process.argv[2]), host: "127.0.0.1", backlog: 4096 });

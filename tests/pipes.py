"""Named pipes whose server is on Linux, run by a Windows Python: python.exe pipes.py PORT

A line `serve NAME` on standard input makes a pipe, and comes back once it is there. Each connection
of a client becomes one to 127.0.0.1:PORT that begins with the line NAME. `ready` comes back too.
It ends where its standard input does.
"""

import _winapi
import contextlib
import os
import socket
import sys
import threading

PIPE_UNLIMITED_INSTANCES = 255
BUFFER = 65536


def serve(name: str, port: int) -> None:
    """The instance that waits is there already when another's client is served."""
    mode = _winapi.PIPE_ACCESS_DUPLEX | _winapi.FILE_FLAG_OVERLAPPED
    how = (mode, 0, PIPE_UNLIMITED_INSTANCES, BUFFER, BUFFER, 0, _winapi.NULL)
    pipe = _winapi.CreateNamedPipe(name, *how)
    print("serve", name, flush=True)
    while True:
        with contextlib.suppress(OSError):  # ERROR_NO_DATA: a client that has come and gone
            _winapi.ConnectNamedPipe(pipe, overlapped=True).GetOverlappedResult(True)
        client, pipe = pipe, _winapi.CreateNamedPipe(name, *how)
        threading.Thread(target=Relay(client, name, port).run, daemon=True).start()


class Relay:
    def __init__(self, pipe: int, name: str, port: int) -> None:
        self.pipe = pipe
        self.server = socket.create_connection(("127.0.0.1", port))
        self.server.sendall(f"{name}\n".encode())
        self.over = False

    def run(self) -> None:
        """From the server to the client, until either has closed its side."""
        to_server = threading.Thread(target=self.to_server, daemon=True)
        to_server.start()
        with contextlib.suppress(OSError):
            while data := self.server.recv(BUFFER):
                writing, _ = _winapi.WriteFile(self.pipe, data, overlapped=True)
                writing.GetOverlappedResult(True)
        self.over = True
        to_server.join()
        # What is still in the pipe the client can read (DisconnectNamedPipe would drop it).
        _winapi.CloseHandle(self.pipe)
        self.server.close()

    def to_server(self) -> None:
        with contextlib.suppress(OSError):
            while not self.over:
                reading, _ = _winapi.ReadFile(self.pipe, BUFFER, overlapped=True)
                while _winapi.WaitForMultipleObjects([reading.event], False, 100):
                    if self.over:
                        reading.cancel()
                size, _ = reading.GetOverlappedResult(True)
                self.server.sendall(reading.getbuffer()[:size])
        with contextlib.suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)


def main(port: int) -> None:
    for line in sys.stdin:
        word, *name = line.split()
        if name:
            threading.Thread(target=serve, args=(*name, port), daemon=True).start()
        else:
            print(word, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))

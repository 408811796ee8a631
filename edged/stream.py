"""One TLS 1.3 connection between two ranks, carrying frames in strict lock-step.

Both sides know the other's certificate before they meet and accept no other. A frame is a prefix of
its length and its number, then its bytes; who reads says which length it waits for, so nothing that
the other side sends sizes a buffer here, and a rank out of step is told from one that is slow.

TLS runs on memory BIOs: as fast here as an SSLSocket, one system call a frame instead of two a
record, and `bytes_sent` counts what the TCP socket took, handshake and record heads included.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import struct
from typing import Any, cast

from .certificate import Credential
from .errors import PeerError, ProtocolError

PREFIX = struct.Struct("!IQ")  # length of the frame, its number in this direction; 2**64 never comes
RECORD_BYTES = 1 << 14  # of plain text in one TLS record
PIECE_BYTES = 1 << 18  # encrypted at once of a large frame, so that sending goes on beside it
RAW_BYTES = 1 << 18  # taken from the socket at once


def context_for(own: Credential, peer: bytes, is_server: bool) -> ssl.SSLContext:
    """TLS 1.3, our certificate, and the peer's (DER) as the only authority there is.

    OSError where the system has no file in memory, ssl.SSLError where `peer` is no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the certificate names a rank of a group, not a host
    context.verify_mode = ssl.CERT_REQUIRED
    if is_server:
        context.num_tickets = 0  # nobody comes back
    context.load_verify_locations(cadata=peer)
    if not hasattr(os, "memfd_create"):  # beside Linux, and in older C libraries on it
        raise OSError(errno.ENOSYS, "expected memfd_create, to hand `ssl` a key that touches no disk")
    keys = os.memfd_create("edged-key", os.MFD_CLOEXEC)
    try:
        os.write(keys, own.pem)
        context.load_cert_chain(f"/proc/self/fd/{keys}")
    finally:
        os.close(keys)
    return context


class Stream:
    """Our end of the connection to `rank`. `handshake` until it is done, then frames.

    `send` and `expect` begin a frame; `flush` and `fill` go on with it and say whether it is done.
    No call blocks. PeerError names the rank when the connection ended; ProtocolError when what came
    is not the frame that was expected. Made of a connection that is none any more, it closes `sock`
    and raises OSError.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, rank: int, is_server: bool) -> None:
        try:
            self.is_local = _take_over(sock)
        except OSError:
            sock.close()
            raise
        self.rank, self.bytes_sent = rank, 0
        self.wait_s = 0.0  # a running mean of how long frames of this rank are waited for
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=is_server)
        self._raw = memoryview(bytearray(RAW_BYTES))
        self._is_fed = False  # the TLS object may hold more than was read
        self._unsent = memoryview(b"")  # encrypted, and not taken by the socket yet
        self._plain = memoryview(b"")  # of the frame being sent, not encrypted yet
        self._small = memoryview(bytearray(RECORD_BYTES))
        self._buffer = memoryview(bytearray(RECORD_BYTES))
        self._frame = self._buffer[:0]
        self._got = 0
        self._numbers = [0, 0]  # of the next frame out and in

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    # --- meeting ---

    def handshake(self) -> bool:
        """Go on; True when it is done. ssl.SSLError or OSError when the other side is not the one."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._pump()
                if not self._take():
                    return False
            except ssl.SSLError:
                with contextlib.suppress(OSError, PeerError):
                    self._pump()  # the alert
                raise
            else:
                return self._pump()

    def check_peer(self, certificate: bytes, group: str) -> None:
        """ProtocolError unless the other side showed exactly `certificate`, of its rank in `group`."""
        shown = self._tls.getpeercert() or {}
        subject: Any = shown.get("subject", ())
        named = {key: value for row in subject for key, value in row}
        expected = {"organizationalUnitName": group, "commonName": str(self.rank)}
        if self._tls.getpeercert(binary_form=True) != certificate or named != expected:
            raise ProtocolError(f"expected the certificate of rank {self.rank} in this group")

    # --- frames ---

    def send(self, frame: memoryview) -> bool:
        """Begin to send `frame` (bytes, contiguous), which stays as it is until this or `flush` says True."""
        size, end = frame.nbytes, PREFIX.size + frame.nbytes
        number = self._numbers[0]
        self._numbers[0] = number + 1
        if end <= RECORD_BYTES:
            PREFIX.pack_into(self._small, 0, size, number)
            self._small[PREFIX.size : end] = frame
            self._plain = self._small[:end]
        else:
            self._encrypt(memoryview(PREFIX.pack(size, number)))
            self._plain = frame
        return self.flush()

    def flush(self) -> bool:
        """Encrypt and send as much as the socket takes; True when nothing is left."""
        while self._plain:
            if not self._pump():
                return False
            piece, self._plain = self._plain[:PIECE_BYTES], self._plain[PIECE_BYTES:]
            self._encrypt(piece)
        return self._pump()

    def expect(self, size: int) -> None:
        """Begin to wait for a frame of `size` bytes; what the last one held is overwritten."""
        end = PREFIX.size + size
        if end > self._buffer.nbytes:
            self._buffer = memoryview(bytearray(end))
        self._frame, self._got = self._buffer[:end], 0

    def fill(self) -> bool:
        """Take what is there; True when the frame is whole."""
        frame, end = self._frame, self._frame.nbytes
        while self._got < end:
            if not self._is_fed and not self._take():
                return False
            begun = self._got
            try:
                self._got += cast(int, self._tls.read(end - begun, frame[begun:]))
            except ssl.SSLWantReadError:
                self._is_fed = False
                continue
            except ssl.SSLEOFError as error:
                raise self._gone() from error
            except ssl.SSLError as error:
                raise ProtocolError(f"expected sound records of rank {self.rank}; {error.reason}") from error
            if self._got == begun:
                raise self._gone()
            if begun < PREFIX.size <= self._got:
                self._check_prefix(end - PREFIX.size)
        self._is_fed = bool(self._incoming.pending or self._tls.pending())
        return True

    @property
    def frame(self) -> memoryview:
        """The frame that `fill` made whole, until the next `expect`."""
        return self._frame[PREFIX.size :]

    def _check_prefix(self, size: int) -> None:
        found, expected = PREFIX.unpack_from(self._frame), (size, self._numbers[1])
        if found != expected:
            raise ProtocolError(
                f"expected frame {expected[1]} of rank {self.rank} with {size} bytes; "
                f"frame {found[1]} with {found[0]} bytes came: the ranks are out of step"
            )
        self._numbers[1] += 1

    def _encrypt(self, piece: memoryview) -> None:
        try:
            while piece:
                piece = piece[self._tls.write(piece) :]
        except ssl.SSLError as error:  # TLS is over since an alert, or since a record that was none
            raise self._gone() from error

    # --- the socket ---

    def _pump(self) -> bool:
        """Hand encrypted bytes to the socket; True when none are left."""
        while True:
            if not self._unsent:
                if not self._outgoing.pending:
                    return True
                self._unsent = memoryview(self._outgoing.read())
            try:
                count = self._sock.send(self._unsent)
            except BlockingIOError:
                return False
            except OSError as error:
                raise self._gone() from error
            self.bytes_sent += count
            self._unsent = self._unsent[count:]

    def _take(self) -> bool:
        """Feed TLS what the socket has; False when it has nothing."""
        try:
            count = self._sock.recv_into(self._raw)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._gone() from error
        if not count:
            raise self._gone()
        self._incoming.write(self._raw[:count])
        self._is_fed = True
        return True

    def _gone(self) -> PeerError:
        return PeerError(f"rank {self.rank} is gone: its stream ended", rank=self.rank)


def _take_over(sock: socket.socket) -> bool:
    """Make `sock` ready for a stream; whether its other end is on this machine. OSError where it is
    not connected: refused, or reset before it was accepted."""
    if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(code, os.strerror(code))
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    is_local: bool = sock.getpeername()[0] == sock.getsockname()[0]
    return is_local

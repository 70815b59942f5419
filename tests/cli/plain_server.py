"""Answers like an OpenAI-compatible server without the plugin; prints its port on its first line."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

MESSAGE = {"role": "assistant", "content": "Hello."}
BASE = {"id": "chatcmpl-1", "created": 1, "model": "plain"}
DONE = {"index": 0, "finish_reason": "stop"}


class Plain(BaseHTTPRequestHandler):
    """One model, one answer."""

    def do_GET(self) -> None:
        self._send(json.dumps({"object": "list", "data": [{"id": "plain", "object": "model"}]}), "application/json")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if asked.get("stream"):
            chunk = {**BASE, "object": "chat.completion.chunk", "choices": [{**DONE, "delta": MESSAGE}]}
            self._send(f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n", "text/event-stream")
        else:
            body = {**BASE, "object": "chat.completion", "choices": [{**DONE, "message": MESSAGE}]}
            self._send(json.dumps(body), "application/json")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _send(self, text: str, content_type: str) -> None:
        self.send_response(200)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


if __name__ == "__main__":
    server = HTTPServer(("127.0.0.1", 0), Plain)
    print(server.server_port, flush=True)
    server.serve_forever()

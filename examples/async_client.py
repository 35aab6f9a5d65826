"""Ask a server several questions at once from asyncio, over the generated gRPC stubs."""

import argparse
import asyncio

import grpc

from keysift.engine import Engine, EngineConfig
from keysift.server import inference_pb2 as pb
from keysift.server.inference_pb2_grpc import InferenceStub
from keysift.server.options import ServerConfig
from keysift.server.server import Server


async def ask(stub: InferenceStub, topic: str) -> None:
    request = pb.GenerateRequest(text=f"Three {topic} of Europe:", stopping=pb.Stopping(max_new_tokens=16))
    replies = [reply async for reply in stub.Generate(request, timeout=60)]
    text = "".join(reply.output.text for reply in replies)
    print(f"{topic}: {text!r}, TTFT {replies[-1].finish.timings.ttft_ms:.0f} ms")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", help="host:port of a running server; none: this process starts one")
    parser.add_argument("--model", help="for a server of this process: folder, GGUF file or hub name")
    args = parser.parse_args()

    server = Server(ServerConfig(port=0), lambda: Engine(EngineConfig(model=args.model)))
    if args.address is None:
        await server.start()
        await server.worker.loaded
    async with grpc.aio.insecure_channel(args.address or f"127.0.0.1:{server.port}") as channel:
        await asyncio.gather(*(ask(InferenceStub(channel), topic) for topic in ("rivers", "mountains", "lakes")))
    if args.address is None:
        await server.stop()


if __name__ == "__main__":
    asyncio.run(main())

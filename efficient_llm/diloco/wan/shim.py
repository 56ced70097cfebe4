"""What answers a message of the hub: it asks the resident trainer.

It loads neither JAX nor the model, as plain Flower starts it for each message.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from efficient_llm.diloco.wan import flower_frames, local_link

app = ClientApp()


def exchange(message: Message, context: Context) -> Message:
  """Hands the hub's message to the trainer and sends back what it says."""
  answer = local_link.ask(
    str(context.node_config['socket']),
    flower_frames.unpack(message),
    secs=float(context.node_config['secs']),
  )
  return Message(flower_frames.pack(answer), reply_to=message)


app.train()(exchange)

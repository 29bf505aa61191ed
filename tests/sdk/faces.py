"""Virtual models with every option on, as the SDKs' clients see them."""

import itertools

import routed

ASK = [{"role": "user", "content": "Why is the sky blue?"}]
TALK = [{"role": "developer", "content": "Be brief."}, *ASK]

# Ways to fail that another upstream makes good, for answers and for streams.
FAULTS = [
    {"kind": "cut_headers", "reset": True},
    {"kind": "status", "status": 502},
    {"kind": "abort_empty"},
    {"kind": "cut_headers"},
]


class Face:
    """One virtual model as the SDKs' clients see it. With `fails` two of three engines do, at every call."""

    def __init__(self, balancer, clients, model, fails=False):
        self.balancer, self.model, self.think_tags = balancer, model, routed.FACES[model]
        self.faults = itertools.cycle(FAULTS) if fails else None
        self._openai, self._anthropic = clients

    def disturb(self):
        if self.faults:
            self.balancer.heal()
            for at, fault in zip((0, 1), self.faults):
                self.balancer.fail(at, **fault)

    @property
    def openai(self):
        self.disturb()
        return self._openai

    @property
    def anthropic(self):
        self.disturb()
        return self._anthropic

    def chat(self, **change):
        return self.openai.chat.completions.create(**{"model": self.model, "messages": TALK, **change})

    def chunks(self, **change):
        return list(self.chat(stream=True, **change))

    def chat_events(self, **change):
        """Events of the stream helper, and what it made of them."""
        asked = {"model": self.model, "messages": TALK, **change}
        with self.openai.chat.completions.stream(**asked) as stream:
            return list(stream), stream.get_final_completion()

    def response_events(self, **change):
        with self.openai.responses.stream(**{"model": self.model, "input": TALK, **change}) as stream:
            return list(stream), stream.get_final_response()

    def message(self, **change):
        asked = {"model": self.model, "max_tokens": 40, "messages": ASK, **change}
        return self.anthropic.messages.create(**asked)

    def message_events(self, **change):
        asked = {"model": self.model, "max_tokens": 40, "messages": ASK, **change}
        with self.anthropic.messages.stream(**asked) as stream:
            return list(stream), stream.get_final_message()

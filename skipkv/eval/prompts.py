"""How problems are asked, by name: as the published comparisons do, and as the models' own cards advise.

Of mathematics ``plain`` and ``chat`` are those of the comparisons, ``r1`` (DeepSeek-R1: no system prompt, the answer
begins with ``<think>``) and ``qwen3`` those of the cards. Of programs they are LiveCodeBench's own instruction, and
HumanEval's plain completion with Codex's stop texts; HumanEval as a chat has no published form, and this one is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skipkv.engine import Engine

THINK = "<think>\n"
BOX = "Please reason step by step, and put your final answer within \\boxed{}."
PROGRAM = (
    "You will be given a question (problem specification) and will generate a correct Python program that matches the "
    "specification and passes all tests."
)
EXPERT = f"You are an expert Python programmer. {PROGRAM}"
STDIN = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT."
)
STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)
QUESTION = (
    "### Question:\n{{problem}}\n\n### Format: {}\n```python\n{}\n```\n\n"
    "### Answer: (use the provided format with backticks)\n\n"
)
FUNCTION = (
    "Complete the following Python function. Give the whole function in one code block.\n\n```python\n{problem}```"
)


@dataclass(frozen=True)
class Prompt:
    """How an item is asked.

    Attributes
    ----------
    text : str
        With ``{problem}`` in it.
    starter : str
        Its form for an item with ``starter_code``, which stands for ``{starter}``.
    chat : bool
        A user's turn, put through the checkpoint's chat template.
    system : str
        The turn before it.
    opening : str
        What the prompt must end with, whatever the template leaves out.
    stop : tuple of str
        Texts that end the answer.
    """

    text: str
    starter: str = ""
    chat: bool = False
    system: str = ""
    opening: str = ""
    stop: tuple[str, ...] = ()

    def ids(self, model: Engine, problem: str, starter: str | None, variables: Mapping[str, Any] | None) -> list[int]:
        """Ids of what the model is given; variables are those of the chat template."""
        with_starter = self.starter and starter
        text = self.starter.replace("{starter}", starter) if with_starter else self.text
        text = text.replace("{problem}", problem)
        if not self.chat:
            return model.encode(self.system + text, variables)
        turns = [{"role": "system", "content": self.system}] if self.system else []
        ids = model.encode([*turns, {"role": "user", "content": text}], variables)
        written = model.tokenizer.decode(ids[-16:], skip_special_tokens=False)
        return ids if written.endswith(self.opening) else ids + model.tokenizer.encode(self.opening, False)


MATH = {
    "plain": Prompt(
        "You are given a math problem.\n\nProblem: {problem}\n\n You need to solve the problem step by step. First, "
        "you need to provide the chain-of-thought, then provide the final answer.\n\n Provide the final answer in the "
        "format: Final answer:  \\boxed{}"
    ),
    "chat": Prompt(
        "Answer the following questions. You should think step-by-step and put your final answer within \\boxed{}.\n"
        "Question: {problem}", chat=True,
    ),
    "r1": Prompt("{problem}\n" + BOX, chat=True, opening=THINK),
    "qwen3": Prompt("{problem}\n" + BOX, chat=True),
}  # fmt: skip
CODE = QUESTION.format(STDIN, "# YOUR CODE HERE"), QUESTION.format(STARTER, "{starter}")
CODING = {
    "chat": Prompt(*CODE, chat=True, system=EXPERT),
    "plain": Prompt(*(EXPERT + "\n\n" + text for text in CODE)),
    "r1": Prompt(*(PROGRAM + "\n\n" + text for text in CODE), chat=True, opening=THINK),
}
COMPLETION = {
    "plain": Prompt("{problem}", stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint")),
    "chat": Prompt(FUNCTION, chat=True),
    "r1": Prompt(FUNCTION, chat=True, opening=THINK),
}

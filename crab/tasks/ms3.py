"""MS3: mask every object that is seen and sounds at that time (AVSBench-object, multiple sources; Zhou et al., 2022).

One mask a frame for all of them together. Answer: for each span the names of what sounds, and one group of mask tokens;
a frame in which nothing sounds is in no span. Grammar in mask_answer.py. Scored as S4.
"""

from dataclasses import dataclass

from crab.tasks.base import without_question
from crab.tasks.s4 import S4

INSTRUCTION = "Name every object that is seen and makes a sound, and mask them in each second."


@dataclass(frozen=True)
class Ms3(S4):
    name: str = "ms3"

    def instruction(self, question: str | None) -> str:
        without_question(self.name, question)
        return INSTRUCTION

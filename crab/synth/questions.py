"""All samples of a scene: nine tasks, each with instruction, reasoning in prose, answer and exact label."""

from crab.samples import Sample
from crab.synth.avqa import ask
from crab.synth.boxes import arig_samples
from crab.synth.captions import avcap_samples
from crab.synth.events import ave_samples, avvp_samples
from crab.synth.expressions import ref_avs_samples
from crab.synth.mask_samples import avss_samples, ms3_samples, s4_samples
from crab.synth.sample import make_sample
from crab.synth.scene import Scene
from crab.tasks import avqa

QUESTIONS_PER_CLIP = 4


def samples_of(scene: Scene, questions_per_clip: int = QUESTIONS_PER_CLIP) -> list[Sample]:
    """Every sample of the scene: AVVP, AVSS and AVCap have one, AVE, ARIG, S4 and MS3 one where the scene allows it,
    Ref-AVS up to two and AVQA up to `questions_per_clip`."""
    return [
        *ave_samples(scene),
        *avvp_samples(scene),
        *avqa_samples(scene, questions_per_clip),
        *arig_samples(scene),
        *s4_samples(scene),
        *ms3_samples(scene),
        *avss_samples(scene),
        *ref_avs_samples(scene),
        *avcap_samples(scene),
    ]


def avqa_samples(scene: Scene, count: int) -> list[Sample]:
    return [
        make_sample(
            scene,
            task="avqa",
            number=number,
            instruction=avqa.instruction(question.text),
            reasoning=question.reasoning,
            answer=avqa.format_answer(question.answer),
            label={
                "answer": question.answer,
                "question": question.text,
                "type": list(question.type),
            },
        )
        for number, question in enumerate(ask(scene, count))
    ]

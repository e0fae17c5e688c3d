"""Make the demo's data: synthetic judgements of how courteous a shop's reply to a customer is.

Nothing here was said by a person or written by a model: every text is put together from the lists below. A reply is
the answer to the question and a closing whose tone is rude, cold, plain, polite or warm; the score is the tone's
number. The rationale quotes the closing and names its tone, so that the score follows from the rationale and the
rationale from the reply: always in the same words, which a small model learns to write in a few steps.

Each question gets one reply per score: all scores are equally frequent in any set of questions, and a question says
nothing about its score. Held-out questions are new; their closings come from the same lists.

    python recipes/make_demo_data.py tract_fast/data/demo.jsonl            # write it
    python recipes/make_demo_data.py tract_fast/data/demo.jsonl --check    # exit 1 if it is not what would be written
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

QUESTIONS = {  # question: answer
    "Where is my parcel?": "The parcel is in the depot in Leeds.",
    "Can I return these boots?": "Boots can be sent back within 30 days.",
    "Do you have this lamp in green?": "The lamp comes in white and black.",
    "How long does the battery last?": "The battery lasts about nine hours.",
    "Is the tent waterproof?": "The tent keeps rain out up to 3000 mm.",
    "When do you open on Sunday?": "The shop opens at ten on Sunday.",
    "Can I pay by bank transfer?": "Payment is by card or by transfer.",
    "My kettle leaks. What now?": "A new kettle is sent when the old one arrives.",
    "Does the desk fit through a narrow door?": "The desk comes in parts of 60 cm.",
    "Are the chairs already assembled?": "The chairs need four screws each.",
    "Can I change my delivery address?": "The address can be changed until noon.",
    "Why was I charged twice?": "One of the two charges is released in three days.",
    "Do you repair old watches?": "Watches are repaired on the second floor.",
    "Is this soap free of perfume?": "The soap contains no perfume.",
    "How do I reset my password?": "The link is below the login form.",
    "Which bulb fits this fixture?": "The fixture takes a small screw bulb.",
    "Can I order half a metre of cloth?": "Cloth is cut from 20 cm on.",
    "Is the bread baked here?": "The bread is baked in the next street.",
    "Do you ship to Norway?": "Norway takes six days by road.",
    "My voucher does not work. Why?": "The voucher ran out in March.",
    "How heavy is the blue suitcase?": "The suitcase weighs three kilos.",
    "Can the rug be washed?": "The rug goes in at 30 degrees.",
    "Is there a student price?": "Students pay eight euros.",
    "Where can I park?": "The car park is behind the bank.",
    "Can I book a table for nine?": "The long table seats ten.",
    "Do the gloves run small?": "The gloves run one size small.",
    "How old must a child be for the pool?": "Children swim alone from twelve on.",
    "Will the red bike be back in stock?": "Red bikes come in again in May.",
    "Can I cancel my subscription?": "It ends on the last day of the month.",
    "Is the cheese made from raw milk?": "The cheese is made from raw milk.",
    "What is the warranty on the drill?": "The drill has two years.",
    "Do you buy used books?": "Books are bought on Tuesdays.",
    "The mug arrived broken. Can I get another?": "A photo of the mug is enough.",
    "Which train goes to the museum?": "Line four stops at the museum.",
    "Can my dog come along?": "Dogs stay on the ground floor.",
    "Is the paint safe for a cot?": "The paint is safe once it is dry.",
    "How do I bleed the radiator?": "The key turns the valve to the left.",
    "Does the phone take two cards?": "The phone has a tray for two.",
    "Can you engrave a ring by Friday?": "Engraving takes two days.",
    "Why is my photo print so dark?": "The file was saved for another screen.",
    "Are the seeds from this year?": "The seeds were packed in January.",
    "Can I swap the flight for a later one?": "The later flight costs forty more.",
    "Do you fit curtains at home?": "A fitter comes for one hour.",
    "How many people can use one licence?": "One licence covers three people.",
    "Is the museum open at Easter?": "It is shut on Easter Monday.",
    "What size is the smallest frame?": "The smallest frame is 10 by 15.",
    "Can I pick up the cake myself?": "Cakes wait at the side door.",
    "My invoice has the wrong name. Can you fix it?": "Names are corrected in the account.",
    "Does the jacket have a hood?": "The hood is in the collar.",
    "Can I rent skis for a weekend?": "A weekend costs thirty euros.",
    "Where do I hand in lost keys?": "Keys go to the desk by the lift.",
    "Is the oven delivered upstairs?": "It is carried up to the third floor.",
    "How do I join the choir?": "The choir meets on Monday at seven.",
    "Are the nuts roasted with salt?": "They are roasted without salt.",
    "Can I see the flat on Saturday?": "The flat is shown at eleven.",
    "Why does my card get refused?": "The bank asks for a new code.",
    "Do you have the novel in large print?": "Large print is on the last shelf.",
    "How long is the evening course?": "The course has eight evenings.",
    "Can the sofa be made shorter?": "The sofa comes in two lengths.",
    "Is there a lift to the platform?": "The lift is at the north end.",
    "Do the tyres fit my old scooter?": "The tyres fit ten-inch wheels.",
    "Can I get the recipe for the soup?": "The soup is leek and potato.",
    "When will the gate be mended?": "The gate is mended this week.",
    "Is the ferry running in a storm?": "The ferry stops at force nine.",
}
CLOSINGS = {  # tone: how such a reply ends; the first tone scores 1, the last 5
    "rude": ["Now go away.", "Stop wasting our time.", "Read the label, fool.", "You are a nuisance."],
    "cold": ["Not our problem.", "Deal with it.", "Do not write again.", "We have other customers."],
    "plain": ["That is all.", "A copy was filed.", "End of reply.", "The case is closed."],
    "polite": ["Thank you for writing.", "Please let us know.", "We are at your service.", "Kind regards."],
    "warm": ["Have a wonderful day!", "It was a joy to help!", "We are so glad you asked!", "A big hug from us all!"],
}
RATIONALE = 'The words "{closing}" are {tone}.'
# Short, so that a step on a CPU takes seconds
PROMPT = """Customer: {question}
Shop: {answer} {closing}
Courtesy, from 1 (rude) to 5 (warm)?"""


def judgement(number: int, question: str, answer: str, score: int, rng: random.Random) -> dict:
    """One record in the plain form: a reply that deserves ``score``, and the rationale that says why."""
    tone = list(CLOSINGS)[score - 1]
    closing = rng.choice(CLOSINGS[tone])
    return {
        "id": f"demo-{number:02}-{score}",
        "question": question,
        "prompt": PROMPT.format(question=question, answer=answer, closing=closing),
        "rationale": RATIONALE.format(closing=closing.rstrip("."), tone=tone),
        "score": score,
    }


def records(seed: int = 0) -> list[dict]:
    """All records, five replies to each question, in the order of the questions."""
    rng = random.Random(seed)
    return [
        judgement(number, question, answer, score, rng)
        for number, (question, answer) in enumerate(QUESTIONS.items())
        for score in range(1, 6)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the synthetic data of the demo.")
    parser.add_argument("path", type=Path, help="the file to write, tract_fast/data/demo.jsonl in the repository")
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    args = parser.parse_args()
    text = "".join(json.dumps(record) + "\n" for record in records())
    if not args.check:
        args.path.write_text(text, encoding="utf-8")
    elif args.path.read_text(encoding="utf-8") != text:
        print(f"{args.path} is not what this script writes: run it without --check")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Prompts for a base to write its own texts from: `python dev/prompts.py 3000 > runs/prompts.txt`, one a line, none twice.

Stories, questions and, one of eight, code. None of `dlm.bench.prompts` is among them, nor what those are about.
"""

import random
import sys


def told(text: str, by: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split(by)]


WHO = told(
    """
    a baker, a blind painter, a young witch, an old sailor, a robot, a dragon, a bear, a tired nurse, a thief, a king without a crown, a
    girl who cannot sleep, two brothers, a violin maker, a ghost, a farmer, an astronaut, a librarian, a mouse, a detective, a lost dog,
    a gardener, a soldier, a fisherman, a queen, a boy with a kite, a spy, a postman, a cook, a wolf, a mermaid, a teacher, three
    sisters, a giant, a beekeeper, a pilot, a carpenter, a goat, a tailor, an inventor, a snail, a knight, a taxi driver, a grandmother,
    a whale, a magician, an owl, a shepherd, a doctor, a pirate, a frog, a clown, a student, a horse, a judge, a monk, a cat, a
    nightwatchman, a dancer, a miner, a princess, an elephant, a hunter, a street musician, a tortoise, a captain, a scientist, a
    stranger, a child
    """,
    ",",
)
DOES = told(
    """
    who finds a hidden door, who loses a ring in the snow, and a secret garden, who learns to fly, on a small island, in a city under
    the sea, who wants to go home, and a very long winter, who hears a voice in the wall, who saves a village, in a house that moves,
    who makes a new friend, who travels back in time, and a broken promise, during a great storm, who cannot tell a lie, in the desert,
    who plants a strange seed, at the edge of the map, who opens an old box, and the moon, in the year 2200, who meets an enemy, on a
    rainy day, who is afraid of water, who wins a race, who keeps a secret, and a magic mirror, who misses a birthday, in a forest
    without birds, who builds a boat, who steals a painting, and a lost map, who has one wish, at a crowded market, who learns what
    courage is, on the night before a wedding, in the mountains, who forgets everything, and a talking tree
    """,
    ",",
)
TELL = told(
    """
    Write a short story about {}.; Tell me a story about {}.; Write the beginning of a story about {}.; Tell a story for children about
    {}.; Write a fairy tale about {}.; Tell me a bedtime story about {}.; Can you write a story about {}?; Write a funny story about
    {}.; Write a sad story about {}.; Write a scary story about {}.; I would like to read a story about {}.; Make up a fable about {}.;
    Write a story with a happy ending about {}.; Write a mystery about {}.
    """,
    ";",
)
WHAT = told(
    """
    gravity, a volcano, the heart, democracy, a black hole, inflation, the internet, photosynthesis, a vaccine, the ocean tide, a
    battery, an earthquake, jazz, the printing press, electricity, evolution, a rainbow, the French Revolution, a microwave oven, a
    virus, the water cycle, the stock market, DNA, a computer, sleep, memory, a telescope, the Roman Empire, chess, a bridge, an
    airplane, yeast, a solar panel, the moon, the immune system, glass, a desert, magnetism, a search engine, thunder, the human eye, a
    bicycle, a tree, coffee, paper, the Silk Road, a glacier, salt, the brain, a camera, a hurricane, Mars, music, a contract, the Great
    Wall of China, an atom, soap, a satellite, steel, bread, a whale, the Olympic Games, a radio, concrete, fire, a poem, the periodic
    table, a dream, honey, the kidney, an engine, a fossil, a budget, the United Nations, a language, a constitution, chocolate, oxygen,
    a laser, the seasons, sound, a bank, a submarine
    """,
    ",",
)
ASK = told(
    """
    How does {} work?; What is {}?; Why is {} important?; Explain {} to a child.; Where does {} come from, and why does it matter?; Tell
    me about {}.; What should I know about {}?; What are three facts about {}?; Can you explain {} in simple words?; What are the
    benefits and the dangers of {}?; What is the history of {}?; Who first understood {}, and how?; What would the world be like without
    {}?; What do people get wrong about {}?
    """,
    ";",
)
APART = told(
    """
    What is the difference between {} and {}?; How are {} and {} related?; Compare {} with {}.; Which came first, {} or {}, and why?
    """,
    ";",
)
PEOPLE = told(
    """
    Marie Curie, Isaac Newton, Cleopatra, Leonardo da Vinci, Albert Einstein, Nelson Mandela, Charles Darwin, Galileo, Florence
    Nightingale, Mozart, Alan Turing, Joan of Arc, Gandhi, Shakespeare, Rosa Parks, Aristotle, Frida Kahlo, Julius Caesar, Jane Austen,
    Nikola Tesla, Beethoven, Marco Polo, Amelia Earhart, Confucius
    """,
    ",",
)
ABOUT = told(
    """
    Who was {}, and what for is the name known?; What did {} do?; Tell me about the life of {}.; Why do people still speak of {}?
    """,
    ";",
)
MAKE = told(
    """
    adds two matrices, reverses a string, counts the words of a file, sorts a list of names, finds the largest number, computes a
    factorial, merges two lists, reads a CSV file, removes duplicates, converts Celsius to Fahrenheit, finds the shortest path, draws a
    random card, checks a password, parses a date, computes the average, prints a multiplication table, searches a sorted list, flattens
    a nested list, counts vowels, generates Fibonacci numbers, finds palindromes, downloads a page, rolls two dice, validates an e-mail
    address, splits a bill, transposes a table, caches results, compares two texts
    """,
    ",",
)
CODE = told(
    """
    Write a Python function that {}.; Write a JavaScript function that {}.; Write a program that {}, and explain it.; Show me code that
    {}.; Write a function with a test that {}.; How do I write a Python script that {}?
    """,
    ";",
)


def prompt(rng: random.Random) -> str:
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(TELL).format(f"{rng.choice(WHO)} {rng.choice(DOES)}")
    if kind < 5:
        return rng.choice(ASK).format(rng.choice(WHAT))
    if kind == 5:
        return rng.choice(APART).format(*rng.sample(WHAT, 2))
    if kind == 6:
        return rng.choice(ABOUT).format(rng.choice(PEOPLE)) if rng.random() < 0.4 else rng.choice(APART).format(*rng.sample(WHAT, 2))
    return rng.choice(CODE).format(rng.choice(MAKE))


def main() -> None:
    rng, said = random.Random(0), dict[str, None]()
    while len(said) < int(sys.argv[1]):
        said[prompt(rng)] = None
    print("\n".join(said))


if __name__ == "__main__":
    main()

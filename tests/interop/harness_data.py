"""Provide questions, documents and expected scores for the tests of the harness."""

TRAINING, BOS, LONGEST = 16, 256, 64
QUESTIONS = [
    {"question": "The sky is", "choices": [" blue", " of stone and glass"], "answer": 0},
    {"question": "One, two, three and so on to", "choices": [" ten", " the end"], "answer": 1},
    {"question": "It is ", "choices": ["so", "nobody's business", "no"], "answer": 0},  # spaces go to the answers
    {"question": "", "choices": ["Yes", "No"], "answer": 1},
]
DOCUMENTS = ["It was a bright cold day in April, and the clocks were striking.", "No.", "Où est-il allé hier ?"]


def bytes_of(text):
    return list(text.encode())


def answers(log_likelihoods, question):
    """Return the log-likelihood of each choice, and whether greedy decoding produces it."""
    found = []
    for choice in question["choices"]:
        context = question["question"].rstrip()
        continuation = bytes_of((question["question"] + choice)[len(context) :])
        tokens = [BOS, *bytes_of(context), *continuation]
        log_p, likeliest = log_likelihoods(tokens)
        n = len(continuation)
        found.append((log_p[-n:].sum(), (likeliest[-n:] == continuation).all()))
    return found


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]

"""RULER's variable tracking: assignments spread over the text; which variables hold a value."""

from .prompts import Prompt, PromptTask, hide, random_depths

N_HOPS, N_CHAINS = 4, 3
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def draw_variables(rng, count):
    found: list[str] = []
    while len(found) < count:
        name = "".join(LETTERS[i] for i in rng.integers(0, 26, 5))
        if name not in found:
            found.append(name)
    return found


class VariableTracking(PromptTask):
    """`VAR A = 12345`, later `VAR B = A`, ...: all variables of one of three chains."""

    name = "variable-tracking"
    slack = 12

    def make(self, haystack, n_bytes, rng, depth, n_questions=1):
        names = draw_variables(rng, N_CHAINS * (N_HOPS + 1))
        values = rng.choice(90_000, N_CHAINS, replace=False) + 10_000
        lines, chains = [], []
        for number, value in enumerate(values):
            chain = names[number * (N_HOPS + 1) : (number + 1) * (N_HOPS + 1)]
            # An assignment stands before those that refer to it.
            depths = sorted(random_depths(rng, len(chain)))
            if number == 0:
                depths[0] = min(depth, depths[1])
            sources = [str(value), *chain[:-1]]
            lines += [
                (d, f"VAR {name} = {source}\n".encode())
                for d, name, source in zip(depths, chain, sources, strict=True)
            ]
            chains.append(chain)
        ask = (
            f"# Question: which variables above are assigned the value {values[0]}, directly or "
            f"through others? Answer: the {N_HOPS + 1} variables are "
        ).encode()
        context = hide(haystack, lines, n_bytes - len(ask), rng)
        return [Prompt(context, (ask,), (tuple(chains[0]),), depth)]

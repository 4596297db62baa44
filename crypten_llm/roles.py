"""Who is who: ranks and their names, the same on every engine."""

OWNER = 0
CLIENT = 1
DEALER = 2  # of two compute parties, as on engine ``wire``


def role_names(compute_parties: int) -> list[str]:
    """Names by rank for ``compute_parties`` parties and the dealer, which is the last rank."""
    return ["owner", "client", *(f"compute {rank}" for rank in range(2, compute_parties)), "dealer"]

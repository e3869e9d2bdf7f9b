"""placeholder until the registry lands"""


def resolve(spec):
    return spec

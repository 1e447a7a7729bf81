"""What TRL imports from here beside SamplingParams."""


class StructuredOutputsParams:
    pass

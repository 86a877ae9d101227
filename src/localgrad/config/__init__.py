"""What a run is: dataclasses, their checks, and the objects that they describe."""

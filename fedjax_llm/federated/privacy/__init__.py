"""What is promised, how it is accounted for, and what adds the noise."""

"""Worked answers to the exercises of 5_rectflow.ipynb. Each goes into the first lines of its
exercise's cell; none of them runs alone."""


# Exercise 1: somewhat after 1/2. Asked early, the velocity cannot yet tell the moons' parts apart
# and points to a mean once more. Asked late, the first step has left the true path too far behind:
# it pulls every noise to the one mean of all data.
best = 0.6


# Exercise 2: x and x_t are jointly normal with covariance t s^2. A path is x_t = t m + root(t) z,
# where root(t)^2 = t^2 s^2 + (1 - t)^2. The root is not linear in t, so the paths are not straight,
# but for s = 0, a single point.
def gaussian_velocity(x_t, t, m, s):
    variance = t**2 * s**2 + (1 - t) ** 2
    mean = m + t * s**2 / variance * (x_t - t * m)
    return (mean - x_t) / (1 - t)


# Exercise 3: sorted with sorted. Then z < z' has x <= x', and the lines between them keep their
# order at all times. It is the optimal transport on a line, and what reflow would leave alone.
def partners(z, x):
    return x.sort().values[z.argsort().argsort()]

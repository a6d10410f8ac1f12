"""Worked answers to the exercises of 3_sim.ipynb. Each goes into the first lines of its exercise's
cell; none of them runs alone."""


# Exercise 1: d = (|y|^2)^2, so d' = 2 |y|^2 2 y. It listens to the samples where the scores differ
# most, and nearly ignores the others: the opposite of the pseudo-Huber distance.
def fourth_power(y):
    square = y.square().sum(1)                                                      # (B,)
    return square**2, 4 * square[:, None] * y


# Exercise 2: D_fake - x has expectation 0 given x_t if D_fake = E[x | x_t], and d'(y) is a function
# of x_t alone. So the loss is 0 for a student of any kind, good or bad, and its value says only how
# far the fake score lags. At another alpha, 2 (1 - alpha) E d(y) is all that is left.
expected = 0.0


def factor(alpha):
    return 2 * (1 - alpha)


# Exercise 3: -d'(y)^T (D_fake - x) = ... + 2 (D_fake - D_real)^T x; the term with alpha has no
# living x. That is DMD's gradient, but for the size by which DMD divides a sample's.
script = "dmd"


def left_over(x, d_real, d_fake):
    return 2 * (d_fake - d_real)

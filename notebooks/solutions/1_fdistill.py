"""Worked answers to the exercises of 1_fdistill.ipynb. Each goes into the first lines of its
exercise's cell; none of them runs alone."""


# Exercise 1: f'' = 2, so h = r^2 f'' = 2 r^2. It grows even faster than forward KL's h = r: what
# counts is where the student has far too little mass, and few samples carry the batch.
def pearson(r):
    return 2 * r**2


# Exercise 2: those whose h is a power of r. Then h(2 r) is a number times h(r), and the mean has
# the same factor. In r / (r + 1), 1 / (r + 1) and r + 1 a wrong factor shifts the place where the
# weight bends. That is why the script brings the ratio to mean 1 (balance_ratio).
unharmed = {"rkl", "fkl", "hellinger", "neyman"}


# Exercise 3: where q has mass, p = w q with the mode's weight w, so KL(q || p) = E_q[log q / p]
# = -log w. A gradient does not see it: it is the same for all small shifts of the student.
on_smaller = -torch.tensor(0.25).log().item()
on_larger = -torch.tensor(0.75).log().item()

"""The players behind `lab.rivals`: run within the node, under the name of whom they play.

Laws: every write is one process of iptables, as theirs is; what only they would know (chains, comments) is theirs,
letter for letter; nobody knows of nodewalld. Standard input says what to do now, a line each; each is answered with the
number of writes so far, and with every place that was taken by them.
"""

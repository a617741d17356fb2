"""One training file per recipe, cut out of the trainer.

`write` is the door. `driver` is the file's own line, from arguments to result, and the root of all
that is live; `stand_ins` replaces what a lone file does without. `cut` walks over the live code,
`program` says what names in it mean, `world` keeps what is known, `walk` and `statements` decide.

A recipe is frozen data, so every object of a spec's class is known before anything runs. Types are
read from annotations, which the type checker holds the code against: an expression of a spec's
type can only be one of the known objects, one of a class that live code never makes can only be
None. A condition that comes out the same for all of these is replaced by its outcome, and what
stands in the other arm is not walked over, so what it names is not live. Wherever something is not
understood, both arms stay: the file is larger, and no less right. What could make this false unseen
is refused by an ExportError: globals that are rebound, attributes set by name, statements of a
module that act on a library, a model that running code makes. The walk starts with nothing known to
be made and is repeated until it finds nothing new; a condition on what nobody makes yet waits until
the end. What a module registers with an operator of torch's is live with the operator. Imports of
packages that only some machines have stay where they stand: in their function, or, at the top of a
module, before all of its definitions, which are there only where the import succeeds. At last every
name of the file is looked up in it.
"""

"""The exceptions that are meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can put right. The text is one sentence: what is wrong, where, and what to do."""


class NothingToDo(Exception):
    """A stage has been finished already with these settings and inputs. The text is a sentence; it is no error."""

"""Completion of commands and flags in the shell."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.cli.parser import Parser

_SCRIPT = """# bash: eval "$(model-service completion)"; zsh: the same after `autoload -U bashcompinit; bashcompinit`
_model_service() {
  local words
  case "${COMP_CWORD}:${COMP_WORDS[1]}" in
    1:*) words="%s" ;;
%s
  esac
  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _model_service model-service"""


def write_completion(parser: "Parser") -> int:
    """Print a script for bash, or zsh with bashcompinit, that completes the commands of a parser and their flags."""
    cases = [f'    *:{name}) words="{" ".join(each.flags)}" ;;' for name, each in parser.commands.items()]
    print(_SCRIPT % (" ".join(parser.commands), "\n".join(cases)))
    return 0

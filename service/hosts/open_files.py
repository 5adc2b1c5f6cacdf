"""How many files a process may have open: a connection is one."""

import logging
import resource

from service.settings import Settings

logger = logging.getLogger("service")

RESERVED = 128  # files of a worker beside its connections, without what it shares with other processes
SHARED = 4  # for each of those


def fit_open_files(settings: Settings, processes: int) -> Settings:
    """Raise this process's limit, which its children have too, to what `max_connections` needs.

    Args:
        settings: how to run.
        processes: that will be started.

    Returns:
        The settings; with fewer connections, after a warning, where the limit cannot be raised that far.
    """
    others = RESERVED + SHARED * processes
    wanted = settings.max_connections + others
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit == wanted:
        return settings
    connections = max(1, limit - others)
    logger.warning(
        "a worker takes %d connections, not --max-connections=%d: it may open %d files; raise `ulimit -Hn` to %d",
        connections,
        settings.max_connections,
        limit,
        wanted,
    )
    return settings.model_copy(update={"max_connections": connections})

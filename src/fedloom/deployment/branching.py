"""Branch of a tree of servers, as `fedloom branch` runs it: a client of the server above, a server to its clients.

To its clients it is what `fedloom serve` is, to the server above what `fedloom join` is: a SuperNode brings questions
to a Unix socket. They are answered here, one after another, in the same process that asks the clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from queue import Empty

from fedloom.deployment.addresses import split_address
from fedloom.deployment.client.joining import Kit, at_work, ended_together, start_node
from fedloom.deployment.client.preflight import await_server
from fedloom.deployment.client.watching import Presence, RefusedKey, watch
from fedloom.deployment.client.worker_process import is_gone, reply, take_in
from fedloom.deployment.keys import Security, in_use
from fedloom.deployment.processes import WORKER_SOCKET, check_flower, private_folder
from fedloom.deployment.queue import BRANCH
from fedloom.deployment.server.answering import check_branchable, open_branch
from fedloom.deployment.server.serving import link_to_clients
from fedloom.deployment.signing import Verifier
from fedloom.errors import DeploymentError
from fedloom.host.frames import listen
from fedloom.host.signals import Interruption
from fedloom.monitoring.display import Terminal
from fedloom.monitoring.observer import Observer, Observers
from fedloom.monitoring.status import status_file
from fedloom.recipe.recipe import Recipe


def branch(
    kit: Kit,
    recipe: Recipe,
    *,
    port: int,
    security: Security | None,
    wait_seconds: float,
    first_client: int,
    observers: Sequence[Observer] = (),
) -> None:
    """Wait for clients, then take part for them in the runs of the kit's server, until the process is told to end.

    Raises:
        FedloomError: what the person who asked can mend.
    """
    check_flower()
    check_branchable(recipe, first_client)
    check_above(kit, port, security)
    with ExitStack() as stack:
        watching = [Terminal(), *observers]
        if security:
            stack.enter_context(in_use(security.folder, security.folder))
            watching.append(stack.enter_context(status_file(security.folder, BRANCH)))
        show = Observers(*watching)
        say = show.show_step
        stack.enter_context(at_work(kit.name, kit.journal))
        home = stack.enter_context(private_folder())
        interruption = stack.enter_context(Interruption(partial(say, "leaving")))
        link = stack.enter_context(link_to_clients(port, security, say))
        # First of all its clients: what it tells of itself above is theirs.
        answerer = open_branch(
            kit.name,
            recipe,
            link,
            show,
            interruption.check,
            folder=home,
            wait_seconds=wait_seconds,
            first_client=first_client,
            open_question=Verifier(kit.signer, kit.name).open if kit.signer else None,
        )
        waiting = take_in([listen(str(home / WORKER_SOCKET))])
        greet = partial(await_server, kit.server, kit.ca, say, interruption.check)
        if told := greet().words:
            say("server", told)
        if kit.key:
            say("key", kit.end)
        children = stack.enter_context(ended_together())
        children["SuperNode"] = node = start_node(kit, home)
        assert node.log, "it has one"
        say("joining", f"{kit.server} as {kit.name}")

        above = Presence(kit.server, node.log, say)

        def look() -> None:
            """Answer the question that is there; else look who of the clients is, and whether the server above is."""
            interruption.check()
            above.look()
            try:
                arrived = waiting.get_nowait()
            except Empty:
                answerer.attend()
                return
            if is_gone(arrived.connection):
                arrived.connection.close()
                say("late", "nobody waits for the answer any more: the question is left out")
            else:
                reply(arrived.connection, answerer.answer(arrived.asked, arrived.came))

        watch(children, {"SuperNode": RefusedKey(kit.name, node.log, greet, say)}, say, look)


def check_above(kit: Kit, port: int, security: Security | None) -> None:
    """Refuse a kit of the branch's own server: there it would be one client too many, and nobody would ask it.

    Raises:
        DeploymentError
    """
    if security and kit.ca:
        is_own = kit.ca == security.ca.read_text(encoding="utf-8")
    else:  # without a certificate, both are on this machine
        is_own = not kit.ca and split_address(kit.server, where="KIT")[1] == port
    if is_own:
        raise DeploymentError(
            f"{kit.name}'s kit leads to this branch's own server, {kit.server}",
            where="KIT",
            mend="name the kit that the owner of the server above sent; --server is what this branch's clients come to",
        )

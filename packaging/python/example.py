"""Launches a VM from a bundle, looks at it, and removes it: what the client that scripts/python-client makes is for.

Usage: HEARTH_SOCKET=/run/hearth/api.sock python3 packaging/python/example.py BUNDLE
Needs: httpx and the package that scripts/python-client writes, installed or on PYTHONPATH.
"""

import os
import sys

import httpx
from hearth_client import Client
from hearth_client.api.bundles import show_bundle
from hearth_client.api.vms import launch_vm, list_vms, remove_vm
from hearth_client.models import ErrorBody, VmLaunchRequest, Wait


def connected(socket):
    """A client of the agent at this unix socket."""
    client = Client(base_url="http://hearth")
    # The name in the URL leads nowhere: everything goes to the socket.
    transport = httpx.HTTPTransport(uds=socket)
    client.set_httpx_client(httpx.Client(base_url="http://hearth", transport=transport, timeout=120))
    return client


def wanted(answer):
    """The answer, if it is not an error: those say what failed and what to do."""
    if isinstance(answer, ErrorBody):
        sys.exit(f"{answer.error.code}: {answer.error.message}")
    return answer


def main():
    [_, word] = sys.argv
    client = connected(os.environ.get("HEARTH_SOCKET", "/run/hearth/api.sock"))
    bundle = wanted(show_bundle.sync(word, client=client))
    print(f"{bundle.name or bundle.id}: {bundle.vcpus} vCPU, {bundle.memory_mib} MiB")
    vm = wanted(launch_vm.sync(client=client, body=VmLaunchRequest(bundle=bundle.id, name="python-example", wait=Wait.RUNNING)))
    try:
        there = wanted(list_vms.sync(client=client)).vms
        print(f"{vm.name} ({vm.id}) is {vm.state}, one of {len(there)}")
        absent = remove_vm.sync("vm-absent", client=client)
        assert isinstance(absent, ErrorBody) and absent.error.code == "not_found", absent
    finally:
        removed = remove_vm.sync_detailed(vm.id, client=client, timeout_ms=0)
    print(f"{vm.name} is removed ({removed.status_code})")


if __name__ == "__main__":
    main()

//! Serving a device to other processes.

#![cfg_attr(
    feature = "ndarray",
    allow(
        deprecated,
        reason = "users ask for ndarray, which upstream deprecates in favour of flex"
    )
)]

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

#[cfg(feature = "flex")]
use burn::backend::Flex;
#[cfg(feature = "ndarray")]
use burn::backend::NdArray;
use burn::{
    backend::DispatchDevice,
    server::{RemoteServer, TokenAuthorizer, WebSocketTransport},
    tensor::Tensor,
};
#[cfg(any(feature = "wgpu", feature = "cuda"))]
use burn_cubecl::CubeBackend;

use super::{Device, REMOTE, credential, remote};
use crate::ops::served_operations;

/// Serves a device to other processes until the process is told to end (Ctrl+C or `SIGTERM`).
///
/// Processes of another version are turned away. The connection is not encrypted. Whoever reaches
/// the port may compute on the device, or whoever knows the [`TOKEN`](super::TOKEN) where there is
/// one: keep it in a trusted network.
///
/// # Errors
///
/// If the device cannot be served, or the listener fails.
pub fn serve(device: Device, listener: TcpListener) -> Result<(), String> {
    let address = listener.local_addr().map_err(|error| error.to_string())?;
    let transport = WebSocketTransport::from_listener(listener);
    let ended = Arc::new(AtomicBool::new(false));
    let until = ended.clone();
    thread::spawn(move || wake_transfers(address, &until));
    let device = device.inner();
    let server = RemoteServer::new([device.clone()]);
    // A server takes operations for the backend of its devices only.
    let server = match device.as_dispatch() {
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => server.with_custom_ops::<Flex>(served_operations()),
        #[cfg(feature = "ndarray")]
        DispatchDevice::NdArray(_) => server.with_custom_ops::<NdArray>(served_operations()),
        #[cfg(any(feature = "wgpu", feature = "cuda"))]
        DispatchDevice::Cube(_) => server.with_custom_ops::<CubeBackend>(served_operations()),
        _ => server,
    };
    let authorizer = TokenAuthorizer::new(credential()).map_err(|error| error.to_string())?;
    let server = server.with_authorizer(authorizer);
    let served = server.serve(transport).map_err(|error| error.to_string());
    ended.store(true, Ordering::Relaxed);
    served
}

/// How long a transfer whose wake-up was lost waits for another one.
const WAKE_INTERVAL: Duration = Duration::from_millis(100);

/// Wakes the transfers from this server to others, again and again.
///
/// Another server that asks for a tensor which is not there yet waits to be woken when one is. Burn
/// 0.22.1 looks first and registers for the wake-up afterwards (`burn-communication`,
/// `get_exposed_tensor_bytes`), so that a tensor that arrives in between wakes nobody: that
/// transfer waits for ever, and the training with it. On busy cores it is one of some 40,000, on a
/// virtual machine whose cores are taken away one of a few hundred. But every tensor that arrives
/// wakes all who wait, so this server sends one to itself now and then, which is such a transfer
/// only between two names of it that do not look the same. The two sessions cost a tenth of a core
/// each, since Burn's polls when it is idle.
fn wake_transfers(address: SocketAddr, ended: &AtomicBool) {
    let [Ok(near), Ok(far)] = names(address).map(|name| remote(&name)) else { return };
    let one = Tensor::<1>::zeros([1], &near);
    while !ended.load(Ordering::Relaxed) {
        drop(one.clone().to_device(&far));
        thread::sleep(WAKE_INTERVAL);
    }
}

/// Two spellings of an address that this process can connect to.
fn names(address: SocketAddr) -> [String; 2] {
    let port = address.port();
    let hosts = match address.ip() {
        IpAddr::V4(ip) => {
            let ip = if ip.is_unspecified() { Ipv4Addr::LOCALHOST } else { ip };
            [ip.to_string(), u32::from(ip).to_string()]
        }
        IpAddr::V6(ip) => {
            let ip = if ip.is_unspecified() { Ipv6Addr::LOCALHOST } else { ip };
            [
                format!("[{ip}]"),
                format!("[{}]", ip.segments().map(|part| format!("{part:04x}")).join(":")),
            ]
        }
    };
    hosts.map(|host| format!("{REMOTE}{host}:{port}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::HashSet, net::ToSocketAddrs};

    #[test]
    fn an_address_has_two_names_that_lead_to_it() {
        for (listening, reached) in [
            ("127.0.0.1:70", "127.0.0.1:70"),
            ("0.0.0.0:70", "127.0.0.1:70"),
            ("10.1.2.3:70", "10.1.2.3:70"),
            ("[::]:70", "[::1]:70"),
            ("[fd00::a:0]:70", "[fd00::a:0]:70"),
        ] {
            let names = names(listening.parse().unwrap());
            for name in &names {
                let addresses = name.strip_prefix(REMOTE).unwrap().to_socket_addrs().unwrap();
                let found: HashSet<_> = addresses.collect();
                assert_eq!(found, HashSet::from([reached.parse().unwrap()]), "{name}");
            }
            assert_ne!(names[0], names[1]);
        }
    }
}

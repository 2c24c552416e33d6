//! Ranks as processes, on one machine or several, with a connection between any two.
//!
//! The first rank listens at an address that all know. The others tell it where they listen, it tells
//! all of them, and every rank connects to those before it. Whoever connects shows a token first. What
//! is sent is a length in 8 bytes, little-endian, and so many bytes.

use std::{
    fmt, io,
    io::{Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread,
    time::{Duration, Instant},
};

use super::{Communicator, Engine, RankError};

/// What one rank must know to meet the others.
#[derive(Clone)]
pub struct Meeting {
    /// The number of this rank.
    pub rank: usize,
    /// All ranks.
    pub size: usize,
    /// The number of this process among those of its machine: which device it takes.
    pub local_rank: usize,
    /// Where the first rank listens, `host:port`.
    pub address: String,
    /// What all ranks show each other.
    pub token: String,
    /// How long to wait for a rank in every collective, and at the start once the first one listens.
    pub patience: Duration,
    /// How long to wait until the first rank listens.
    pub start: Duration,
}

impl fmt::Debug for Meeting {
    /// Without the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {} at {}", self.rank, self.size, self.address)
    }
}

/// Starts every connection, so that another program that happens to listen there is told apart.
const MAGIC: &[u8; 8] = b"yuanrank";
/// Longest token, and longest list of addresses.
const SHORT: u64 = 1 << 16;
/// Time between two attempts to connect to a rank that does not listen yet.
const RETRY: Duration = Duration::from_millis(20);
/// What one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(5);

/// A time in the future, however far.
fn after(wait: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(wait).unwrap_or(now + Duration::from_secs(1 << 30))
}

/// A time to wait that is one: sockets take none for ever.
fn patient(wait: Duration) -> Duration {
    wait.max(Duration::from_millis(1))
}

/// All addresses of this machine of the kind of another one.
fn any(like: &SocketAddr) -> IpAddr {
    match like {
        SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Whether a host by this name or address, without brackets, is this machine and nothing else.
pub(super) fn is_this_machine(host: &str) -> bool {
    matches!(host, "localhost" | "127.0.0.1" | "::1")
}

/// Meets all ranks and returns once all are there.
///
/// # Errors
///
/// If the address cannot be used, or a rank does not come in time or shows another token.
pub fn connect(meeting: &Meeting) -> Result<Communicator, RankError> {
    let Meeting { rank, size, patience, .. } = *meeting;
    if size == 0 || rank >= size {
        return Err(RankError::Layout(format!("rank {rank} is none of {size} ranks")));
    }
    let mut streams: Vec<Option<TcpStream>> = (0..size).map(|_| None).collect();
    if size > 1 {
        meet(meeting, &mut streams)?;
    }
    let peers = streams.into_iter().map(|stream| stream.map(Peer::new).transpose());
    let peers = peers.collect::<Result<_, _>>().map_err(failed("use a connection"))?;
    Ok(Communicator::new(Arc::new(Sockets::new(rank, patience, peers))))
}

fn failed(what: &str) -> impl Fn(io::Error) -> RankError {
    move |error| RankError::Engine(format!("cannot {what}: {error}"))
}

/// Connects this rank with all others.
fn meet(meeting: &Meeting, streams: &mut [Option<TcpStream>]) -> Result<(), RankError> {
    let (deadline, address) = (after(meeting.patience), meeting.address.as_str());
    let found = address.to_socket_addrs().map_err(failed(&format!("find {address}")))?;
    let found: Vec<SocketAddr> = found.collect();
    let first = found.first().ok_or_else(|| RankError::Engine(format!("{address} is nowhere")))?;
    // A machine may know its own name as an address that others cannot reach: the first rank hears
    // all of them, unless they are all on this machine.
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let is_local = is_this_machine(host.trim_start_matches('[').trim_end_matches(']'));
    if meeting.rank == 0 {
        let at = if is_local { *first } else { SocketAddr::new(any(first), first.port()) };
        let listener = TcpListener::bind(at).map_err(failed(&format!("listen at {at}")))?;
        let mut list = vec![String::new(); meeting.size];
        for _ in 1..meeting.size {
            let (rank, port, stream) = accept(&listener, meeting, deadline, streams)?;
            let host = stream.peer_addr().map_err(failed("name a rank"))?.ip().to_canonical();
            // A rank on this machine is where the others find the first one.
            list[rank] = match host.is_loopback() {
                true => format!("{port}"),
                false => SocketAddr::new(host, port).to_string(),
            };
            streams[rank] = Some(stream);
        }
        let list = list.join("\n");
        return streams.iter_mut().flatten().try_for_each(|stream| {
            write_frame(stream, list.as_bytes()).map_err(failed("answer a rank"))
        });
    }
    // Ranks on one machine need not be heard from outside.
    let at = if is_local { first.ip() } else { any(first) };
    let listener = TcpListener::bind((at, 0)).map_err(failed("listen to other ranks"))?;
    let port = listener.local_addr().map_err(failed("listen to other ranks"))?.port();
    let mut stream = call(&found, 0, port, meeting, after(meeting.start))?;
    stream.set_read_timeout(Some(patient(meeting.patience))).map_err(failed("wait for rank 0"))?;
    let first = stream.peer_addr().map_err(failed("name rank 0"))?;
    let deadline = after(meeting.patience);
    let list = read_words(&mut stream, SHORT).map_err(|error| refusal(0, meeting, &error))?;
    streams[0] = Some(stream);
    let list = String::from_utf8_lossy(&list).into_owned();
    let place = |line: &str| match line.parse::<u16>() {
        Ok(port) => Some(SocketAddr::new(first.ip(), port)),
        Err(_) if line.is_empty() => Some(first),
        Err(_) => line.parse().ok(),
    };
    let places: Option<Vec<SocketAddr>> = list.split('\n').map(place).collect();
    let places = places.filter(|places| places.len() == meeting.size);
    let places = places.ok_or_else(|| RankError::Engine("rank 0 sent no list of ranks".into()))?;
    for rank in 1..meeting.rank {
        streams[rank] = Some(call(&places[rank..=rank], rank, port, meeting, deadline)?);
    }
    for _ in meeting.rank + 1..meeting.size {
        let (rank, _, stream) = accept(&listener, meeting, deadline, streams)?;
        streams[rank] = Some(stream);
    }
    streams
        .iter()
        .flatten()
        .try_for_each(|stream| stream.set_read_timeout(None).map_err(failed("use a connection")))
}

/// Connects to a rank and says who calls.
fn call(
    to: &[SocketAddr],
    rank: usize,
    port: u16,
    meeting: &Meeting,
    deadline: Instant,
) -> Result<TcpStream, RankError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(RankError::Silent { rank, seconds: meeting.patience.as_secs() });
        }
        let connected =
            to.iter().find_map(|to| TcpStream::connect_timeout(to, left.min(ATTEMPT)).ok());
        let Some(mut stream) = connected else {
            thread::sleep(RETRY);
            continue;
        };
        let numbers = format!("{} {} {port}", meeting.rank, meeting.size);
        let mut say = || {
            stream.set_read_timeout(Some(patient(left)))?;
            stream.write_all(MAGIC)?;
            write_frame(&mut stream, meeting.token.as_bytes())?;
            write_frame(&mut stream, numbers.as_bytes())
        };
        say().map_err(|error| refusal(rank, meeting, &error))?;
        return Ok(stream);
    }
}

/// Why a rank did not answer as it should.
fn refusal(rank: usize, meeting: &Meeting, error: &io::Error) -> RankError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            RankError::Silent { rank, seconds: meeting.patience.as_secs() }
        }
        _ => RankError::Engine(format!(
            "rank {rank} at {} refuses rank {}: do all ranks have the same token and number of \
             ranks? ({error})",
            meeting.address, meeting.rank
        )),
    }
}

/// The next rank that connects, its number, and the port at which it listens. Whoever shows no token
/// is not answered, and does not keep the others waiting.
fn accept(
    listener: &TcpListener,
    meeting: &Meeting,
    deadline: Instant,
    streams: &[Option<TcpStream>],
) -> Result<(usize, u16, TcpStream), RankError> {
    /// What a caller may take to say who it is.
    const HELLO: Duration = Duration::from_secs(5);
    listener.set_nonblocking(true).map_err(failed("listen"))?;
    loop {
        if Instant::now() >= deadline {
            let missing = |rank: &usize| *rank != meeting.rank && streams[*rank].is_none();
            let rank = (0..meeting.size).rev().find(missing).unwrap_or(0);
            return Err(RankError::Silent { rank, seconds: meeting.patience.as_secs() });
        }
        // What fails for one caller, or for want of descriptors, may not for the next one.
        let Ok((stream, _)) = listener.accept() else {
            thread::sleep(RETRY / 10);
            continue;
        };
        let hear = || {
            stream.set_nonblocking(false)?;
            let mut caller = Until { stream: &stream, deadline: after(HELLO) };
            let mut magic = [0; MAGIC.len()];
            caller.read_exact(&mut magic)?;
            if &magic != MAGIC {
                return Ok(String::new());
            }
            let token = read_words(&mut caller, meeting.token.len() as u64)?;
            let is_known = is_same(&token, meeting.token.as_bytes());
            let numbers = if is_known { read_words(&mut caller, SHORT)? } else { Vec::new() };
            stream.set_read_timeout(None)?;
            Ok::<_, io::Error>(String::from_utf8_lossy(&numbers).into_owned())
        };
        let numbers = hear().unwrap_or_default();
        let numbers: Vec<usize> = numbers.split(' ').filter_map(|n| n.parse().ok()).collect();
        if let [rank, size, port] = numbers[..]
            && size == meeting.size
            && streams.get(rank).is_some_and(Option::is_none)
            && let Ok(port) = u16::try_from(port)
        {
            return Ok((rank, port, stream));
        }
    }
}

/// What a caller says until some time, however slowly.
struct Until<'a> {
    stream: &'a TcpStream,
    deadline: Instant,
}

impl Read for Until<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(buffer)
    }
}

/// Compares in a time that does not tell how much is right.
fn is_same(found: &[u8], expected: &[u8]) -> bool {
    let differences = found.iter().zip(expected).fold(0, |sum, (a, b)| sum | (a ^ b));
    found.len() == expected.len() && differences == 0
}

fn write_frame(stream: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(&(bytes.len() as u64).to_le_bytes())?;
    stream.write_all(bytes)
}

/// What stands in place of a frame's length where a rank only shows that it is alive.
const SIGN_OF_LIFE: u64 = u64::MAX;

/// A frame of at most so many bytes; memory is taken for what arrives, not for what is announced.
fn read_frame(stream: &mut impl Read, most: u64) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 8];
    stream.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    if length == SIGN_OF_LIFE {
        return Ok(None);
    }
    if length > most {
        return Err(io::Error::other(format!("{length} bytes are announced, {most} at most")));
    }
    let mut bytes = Vec::with_capacity(length.min(1 << 20) as usize);
    stream.take(length).read_to_end(&mut bytes)?;
    if bytes.len() as u64 != length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(bytes))
}

/// The frame that a rank says who it is with.
fn read_words(stream: &mut impl Read, most: u64) -> io::Result<Vec<u8>> {
    read_frame(stream, most)?.ok_or_else(|| io::Error::other("a frame is expected"))
}

/// The connection to another rank. A thread reads what it sends, so that two ranks can send each
/// other more than the connection holds.
struct Peer {
    stream: Mutex<TcpStream>,
    arrived: Mutex<Receiver<Vec<u8>>>,
    is_gone: Arc<AtomicBool>,
    heard: Arc<Mutex<Instant>>,
}

/// A connection that takes note of when it was heard of last.
struct Heard {
    stream: TcpStream,
    at: Arc<Mutex<Instant>>,
}

impl Read for Heard {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.stream.read(buffer)?;
        *self.at.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        Ok(bytes)
    }
}

impl Peer {
    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let heard = Arc::new(Mutex::new(Instant::now()));
        let mut reading = Heard { stream: stream.try_clone()?, at: heard.clone() };
        let (give, arrived) = channel();
        let is_gone = Arc::new(AtomicBool::new(false));
        let gone = is_gone.clone();
        thread::spawn(move || {
            while let Ok(frame) = read_frame(&mut reading, u64::MAX) {
                if frame.is_some_and(|bytes| give.send(bytes).is_err()) {
                    break;
                }
            }
            gone.store(true, Ordering::Relaxed);
        });
        Ok(Self { stream: Mutex::new(stream), arrived: Mutex::new(arrived), is_gone, heard })
    }

    /// Shows that this rank is alive, unless it is just sending something.
    fn show_life(&self) {
        if let Ok(mut stream) = self.stream.try_lock() {
            // Whoever waits for the other rank notices when it is gone.
            drop(stream.write_all(&SIGN_OF_LIFE.to_le_bytes()));
        }
    }
}

impl Drop for Peer {
    /// The thread that reads ends, and the other rank learns that this one is gone.
    fn drop(&mut self) {
        let stream = self.stream.get_mut().unwrap_or_else(PoisonError::into_inner);
        drop(stream.shutdown(Shutdown::Both));
    }
}

struct Sockets {
    rank: usize,
    patience: Duration,
    /// None at the place of this rank.
    peers: Arc<Vec<Option<Peer>>>,
}

impl Sockets {
    /// A thread shows the others that this rank is alive, whatever it does, as long as it exists.
    fn new(rank: usize, patience: Duration, peers: Vec<Option<Peer>>) -> Self {
        let peers = Arc::new(peers);
        let (all, interval) = (Arc::downgrade(&peers), (patience / 4).min(BEAT));
        thread::spawn(move || {
            while let Some(peers) = all.upgrade() {
                peers.iter().flatten().for_each(Peer::show_life);
                drop(peers);
                thread::sleep(interval);
            }
        });
        Self { rank, patience, peers }
    }
}

/// How often a rank shows that it is alive.
const BEAT: Duration = Duration::from_secs(1);

impl fmt::Debug for Sockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {} processes", self.rank, self.peers.len())
    }
}

impl Engine for Sockets {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.peers.len()
    }

    fn exchange(&self, members: &[usize], parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, RankError> {
        let mut own = Vec::new();
        for (&rank, part) in members.iter().zip(parts) {
            match &self.peers[rank] {
                None => own = part,
                Some(peer) => {
                    let mut stream = peer.stream.lock().unwrap_or_else(PoisonError::into_inner);
                    write_frame(&mut *stream, &part).map_err(|_| RankError::Gone { rank })?;
                }
            }
        }
        let receive = |&rank: &usize| {
            let Some(peer) = &self.peers[rank] else { return Ok(std::mem::take(&mut own)) };
            let arrived = peer.arrived.lock().unwrap_or_else(PoisonError::into_inner);
            arrived.recv_timeout(self.patience).map_err(|error| match error {
                RecvTimeoutError::Disconnected => RankError::Gone { rank },
                RecvTimeoutError::Timeout => {
                    RankError::Silent { rank, seconds: self.patience.as_secs() }
                }
            })
        };
        members.iter().map(receive).collect()
    }

    fn lost(&self) -> Option<RankError> {
        let peers = || {
            self.peers.iter().enumerate().filter_map(|(rank, peer)| Some((rank, peer.as_ref()?)))
        };
        let is_gone = |(_, peer): &(usize, &Peer)| peer.is_gone.load(Ordering::Relaxed);
        if let Some((rank, _)) = peers().find(is_gone) {
            return Some(RankError::Gone { rank });
        }
        let is_silent = |(_, peer): &(usize, &Peer)| {
            let heard = *peer.heard.lock().unwrap_or_else(PoisonError::into_inner);
            heard.elapsed() > self.patience
        };
        let (rank, _) = peers().find(is_silent)?;
        Some(RankError::Silent { rank, seconds: self.patience.as_secs() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free_address() -> String {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
    }

    fn meeting(rank: usize, size: usize, address: &str) -> Meeting {
        let (patience, start) = (Duration::from_secs(60), Duration::from_secs(60));
        let token = "secret".into();
        Meeting { rank, size, local_rank: rank, address: address.into(), token, patience, start }
    }

    fn on_sockets<T: Send>(size: usize, run: impl Fn(Communicator) -> T + Sync) -> Vec<T> {
        let address = free_address();
        thread::scope(|scope| {
            let rank = |rank| {
                let (run, address) = (&run, &address);
                scope.spawn(move || run(connect(&meeting(rank, size, address)).unwrap()))
            };
            let ranks: Vec<_> = (0..size).map(rank).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    #[test]
    fn ranks_meet_and_exchange_more_than_a_connection_holds() {
        let found = on_sockets(4, |ranks| {
            let part = |to: usize| vec![(10 * ranks.rank() + to) as u8; 3_000_000 * (to + 1)];
            let received = ranks.exchange((0..4).map(part).collect()).unwrap();
            ranks.barrier().unwrap();
            received.iter().map(|bytes| (bytes[0], bytes.len())).collect::<Vec<_>>()
        });
        assert_eq!(found[2], [2, 12, 22, 32].map(|sender| (sender, 9_000_000)));
    }

    #[test]
    fn a_rank_that_ends_is_missed() {
        let found = on_sockets(3, |ranks| match ranks.rank() {
            1 => Ok(Vec::new()),
            _ => ranks.sum(&[1.0]),
        });
        assert_eq!(found[0], Err(RankError::Gone { rank: 1 }));
        assert!(matches!(found[2], Err(RankError::Gone { .. })), "{:?}", found[2]);
    }

    #[test]
    fn a_rank_that_shows_no_life_is_named_and_one_that_does_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let pair = || {
            let to = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (to, listener.accept().unwrap().0)
        };
        let (alive, other) = (pair(), pair());
        let patience = Duration::from_secs(600);
        let first = Sockets::new(0, patience, vec![None, Some(Peer::new(alive.0).unwrap())]);
        let _second = Sockets::new(1, patience, vec![Some(Peer::new(alive.1).unwrap()), None]);
        assert_eq!(first.lost(), None);
        // Its connection stays, and nobody sends.
        let stopped = vec![None, Some(Peer::new(other.0).unwrap())];
        let waits = Sockets::new(0, Duration::from_millis(20), stopped);
        let lost = (0..6000).find_map(|_| {
            thread::sleep(Duration::from_millis(10));
            waits.lost()
        });
        assert_eq!(lost, Some(RankError::Silent { rank: 1, seconds: 0 }));
        drop(other.1);
    }

    #[test]
    fn strangers_are_not_let_in_and_keep_nobody_waiting() {
        let address = free_address();
        thread::scope(|scope| {
            let first = scope.spawn(|| connect(&meeting(0, 2, &address)).map(|ranks| ranks.size()));
            let listens = || TcpStream::connect(&address);
            let mut stranger = std::iter::repeat_with(listens).find_map(Result::ok).unwrap();
            stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            let liar = Meeting { token: "guess".into(), ..meeting(1, 2, &address) };
            let refused = connect(&liar).unwrap_err().to_string();
            assert!(refused.contains("rank 0 at 127.0.0.1"), "{refused}");
            assert!(refused.contains("do all ranks have the same token"), "{refused}");
            connect(&meeting(1, 2, &address)).unwrap();
            assert_eq!(first.join().unwrap(), Ok(2));
        });
    }

    #[test]
    fn a_rank_that_does_not_come_is_named() {
        let none = Duration::ZERO;
        let alone = Meeting { patience: none, start: none, ..meeting(0, 3, &free_address()) };
        assert_eq!(connect(&alone).unwrap_err(), RankError::Silent { rank: 2, seconds: 0 });
        let nobody = Meeting { rank: 1, ..alone };
        assert_eq!(connect(&nobody).unwrap_err(), RankError::Silent { rank: 0, seconds: 0 });
    }
}

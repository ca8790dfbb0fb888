//! The host's end of the guest's program `netbench`: a request is a letter and a number, eight bytes,
//! little-endian. `s`: so many bytes are sent; `r`: so many are received, then one is sent; `e`: so
//! many are sent back, one by one.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::namespace;

const CHUNK_BYTES: usize = 64 << 10;
/// How long a guest may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Serves guests on a port of the host's, which is the result, until this process ends.
pub fn serve() -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((namespace::HOST, 0))?;
    let address = listener.local_addr()?;
    thread::Builder::new().name("net-server".to_owned()).spawn(move || {
        for connection in listener.incoming().flatten() {
            // A guest that goes away is missed by whoever listens to what it prints.
            let _ = answer(connection);
        }
    })?;
    Ok(address)
}

fn answer(mut connection: TcpStream) -> io::Result<()> {
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    let (mut what, mut number) = ([0], [0; 8]);
    connection.read_exact(&mut what)?;
    connection.read_exact(&mut number)?;
    let mut left = u64::from_le_bytes(number);
    let mut buffer = vec![0; CHUNK_BYTES];
    match what {
        [b's'] => {
            while left > 0 {
                let size = left.min(CHUNK_BYTES as u64) as usize;
                connection.write_all(buffer.get(..size).unwrap_or_default())?;
                left -= size as u64;
            }
        }
        [b'r'] => {
            while left > 0 {
                match connection.read(&mut buffer)? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    size => left = left.saturating_sub(size as u64),
                }
            }
            connection.write_all(b"k")?;
        }
        [b'e'] => {
            let mut byte = [0];
            for _ in 0..left {
                connection.read_exact(&mut byte)?;
                connection.write_all(&byte)?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// Sends a byte to a guest that serves on `port` and waits for the answer, `count` times and a tenth
/// more at first; how long it takes each time.
pub fn echo(port: u16, count: u32) -> io::Result<Duration> {
    let warm_up = count / 10;
    let address = SocketAddr::from((namespace::GUEST, port));
    let mut connection = TcpStream::connect_timeout(&address, PATIENCE)?;
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    let mut request = vec![b'e'];
    request.extend(u64::from(count + warm_up).to_le_bytes());
    connection.write_all(&request)?;
    let mut start = Instant::now();
    let mut byte = [b'x'];
    for number in 0..count + warm_up {
        if number == warm_up {
            start = Instant::now();
        }
        connection.write_all(&byte)?;
        connection.read_exact(&mut byte)?;
    }
    Ok(start.elapsed() / count.max(1))
}

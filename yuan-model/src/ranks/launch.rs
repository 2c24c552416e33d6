//! Which rank a process is, by what the launchers of clusters say in its environment.

use std::{env, time::Duration};

use super::{Meeting, RankError, sockets::is_this_machine};

/// The environment variable with the secret of a run's ranks: a process that has another one or none
/// is turned away.
pub const TOKEN: &str = "YUAN_TOKEN";

impl Meeting {
    /// What `torchrun` (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT`) or Slurm's
    /// `srun` (`SLURM_PROCID`, `SLURM_STEP_NUM_TASKS`, `SLURM_LOCALID`, `SLURM_JOB_NODELIST`; a script
    /// that `sbatch` runs has no step and is no rank) says in the environment, and the secret in
    /// [`TOKEN`]. None where no launcher started several processes.
    ///
    /// # Errors
    ///
    /// If a variable is missing or no number, or ranks of several machines have no secret.
    pub fn of_environment(patience: Duration) -> Result<Option<Self>, RankError> {
        Self::of(|name| env::var(name).ok(), patience)
    }

    fn of(
        get: impl Fn(&str) -> Option<String>,
        patience: Duration,
    ) -> Result<Option<Self>, RankError> {
        let refuse = |reason: String| RankError::Layout(reason);
        // torchrun's names, or else Slurm's.
        let names = match get("WORLD_SIZE") {
            Some(_) => ["RANK", "WORLD_SIZE", "LOCAL_RANK"],
            None => ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"],
        };
        let number = |name: &str| -> Result<usize, RankError> {
            let value = get(name).ok_or_else(|| refuse(format!("the launcher set no {name}")))?;
            value.parse().map_err(|_| refuse(format!("{name}={value} is no number")))
        };
        if get(names[0]).is_none() || get(names[1]).is_none() || number(names[1])? < 2 {
            return Ok(None);
        }
        let [rank, size, local_rank] = [number(names[0])?, number(names[1])?, number(names[2])?];
        let host = get("MASTER_ADDR").or_else(|| first_host(&get("SLURM_JOB_NODELIST")?));
        let missing = || "the launcher set no MASTER_ADDR: where is the first rank?".to_owned();
        let host = host.ok_or_else(|| refuse(missing()))?;
        let port = match get("MASTER_PORT") {
            // torchrun itself listens at its port.
            Some(_) => number("MASTER_PORT")? + usize::from(get("TORCHELASTIC_RUN_ID").is_some()),
            // Jobs that run side by side get ports of their own.
            None => 20_000 + number("SLURM_JOB_ID").unwrap_or(0) % 20_000,
        };
        let token = get(TOKEN);
        if token.is_none() && !is_this_machine(&host) {
            return Err(refuse(format!(
                "ranks on several machines need a secret in common: set {TOKEN} to the same random \
                 text for all of them"
            )));
        }
        let address = if host.contains(':') { format!("[{host}]") } else { host };
        let (address, token) = (format!("{address}:{port}"), token.unwrap_or_default());
        let start = patience;
        Ok(Some(Self { rank, size, local_rank, address, token, patience, start }))
    }
}

/// The first of Slurm's hosts: `node[03-04,7]` is `node03`.
fn first_host(list: &str) -> Option<String> {
    let Some((name, numbers)) = list.split_once('[') else {
        return Some(list.split(',').next()?.to_owned());
    };
    if let Some((first, _)) = name.split_once(',') {
        return Some(first.to_owned());
    }
    let first = numbers.split([',', '-', ']']).next()?;
    Some(format!("{name}{first}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meeting(variables: &[(&str, &str)]) -> Result<Option<Meeting>, RankError> {
        let find = |name: &str| variables.iter().find(|(known, _)| *known == name);
        Meeting::of(|name| find(name).map(|(_, value)| (*value).to_owned()), Duration::ZERO)
    }

    #[test]
    fn launchers_say_which_rank_a_process_is() {
        assert!(meeting(&[]).unwrap().is_none());
        assert!(meeting(&[("RANK", "0"), ("WORLD_SIZE", "1")]).unwrap().is_none());
        let torchrun = [
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", "29500"),
            ("TORCHELASTIC_RUN_ID", "none"),
        ];
        let found = meeting(&torchrun).unwrap().unwrap();
        assert_eq!((found.rank, found.size, found.local_rank), (3, 4, 1));
        assert_eq!(found.address, "127.0.0.1:29501");
        let slurm = [
            ("SLURM_PROCID", "9"),
            ("SLURM_STEP_NUM_TASKS", "16"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_JOB_ID", "41234"),
            ("SLURM_JOB_NODELIST", "gpu[03-04]"),
        ];
        let error = meeting(&slurm).unwrap_err().to_string();
        assert!(error.contains("set YUAN_TOKEN"), "{error}");
        let found = meeting(&[&slurm[..], &[(TOKEN, "secret")]].concat()).unwrap().unwrap();
        assert_eq!((found.address.as_str(), found.rank), ("gpu03:21234", 9));
        // The script of a job, which no step runs.
        assert!(meeting(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")]).unwrap().is_none());
        let error = meeting(&[("RANK", "0"), ("WORLD_SIZE", "many")]).unwrap_err().to_string();
        assert_eq!(error, "WORLD_SIZE=many is no number");
    }

    #[test]
    fn the_first_of_slurms_hosts_is_found() {
        let first = |list| first_host(list).unwrap();
        assert_eq!(first("node7"), "node7");
        assert_eq!(first("a1,b[2-3]"), "a1");
        assert_eq!(first("b[2-3],a1"), "b2");
        assert_eq!(first("node[03,07-09]"), "node03");
    }
}
